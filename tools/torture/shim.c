/* Counts the file operations below one folder, and at the n-th of them ends the process or fails.

   Loaded with LD_PRELOAD; nothing happens until torture_arm is called. An operation is what changes a file or a folder:
   opening for writing, writing, syncing, cutting, renaming, removing, making a folder, changing a mode. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long hit, count;
static int failure, torn, lasting, log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* From now on count below `folder`; before operation `n` (0: never) end the process where `error` is 0, else fail with
   `error`: that operation alone, or with `stays` every later one that takes room as well. With `half` a write gives
   half of its bytes first. Each operation is a line of `log`. */
void torture_arm(const char *folder, long n, int error, int half, int stays, int log) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    hit = n, count = 0, failure = error, torn = half, lasting = stays, log_fd = log;
}

long torture_count(void) { return count; }

static int below(const char *path) {
    return root_length && strncmp(path, root, root_length) == 0 && path[root_length] == '/';
}

static void path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    path[size > 0 ? size : 0] = 0;
}

static void path_at(int dir, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (dir == AT_FDCWD) {
        if (!getcwd(path, PATH_MAX)) path[0] = 0;
    } else {
        path_of_fd(dir, path);
    }
    size_t size = strlen(path);
    snprintf(path + size, PATH_MAX - size, "/%s", name);
}

enum { GO_ON, HALF_THEN_END, HALF_THEN_FAIL, FAIL };

/* What is to happen to an operation. `room`: it takes space on the disk; `writes`: it can be done by half. */
static int decide(const char *name, const char *path, int room, int writes) {
    if (!below(path)) return GO_ON;
    pthread_mutex_lock(&lock);
    long number = ++count;
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%ld %s %s\n", number, name, path + root_length + 1);
        syscall(SYS_write, log_fd, line, size);
    }
    pthread_mutex_unlock(&lock);
    if (!hit || number < hit) return GO_ON;
    if (!failure) {
        if (number > hit) return GO_ON;
        if (torn && writes) return HALF_THEN_END;
        syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    }
    if (number > hit && !(lasting && room)) return GO_ON;
    if (lasting && !room) return GO_ON;
    return torn && writes && number == hit ? HALF_THEN_FAIL : FAIL;
}

static int decide_at(const char *name, int dir, const char *given, int room) {
    if (!root_length) return GO_ON;
    int before = errno;
    char path[PATH_MAX];
    path_at(dir, given, path);
    int what = decide(name, path, room, 0);
    errno = before;
    return what;
}

static int decide_fd(const char *name, int fd, int room, int writes) {
    if (!root_length) return GO_ON;
    int before = errno;
    char path[PATH_MAX];
    path_of_fd(fd, path);
    int what = decide(name, path, room, writes);
    errno = before;
    return what;
}

static void end(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); }

#define REAL(name) ((__typeof__(&name))next_##name(#name))
#define NEXT(name)                                                                                                     \
    static void *next_##name(const char *symbol) {                                                                     \
        static void *found;                                                                                            \
        return found ? found : (found = dlsym(RTLD_NEXT, symbol));                                                     \
    }
#define REFUSE(decision)                                                                                               \
    if (decision != GO_ON) {                                                                                           \
        errno = failure;                                                                                               \
        return -1;                                                                                                     \
    }

#define OPENS(name, type, at)                                                                                          \
    NEXT(name)                                                                                                         \
    int name at {                                                                                                      \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list more;                                                                                              \
            va_start(more, flags);                                                                                     \
            mode = va_arg(more, mode_t);                                                                               \
            va_end(more);                                                                                              \
        }                                                                                                              \
        if ((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) {                                                      \
            REFUSE(decide_at("open", DIR_OF_##type, path, flags & O_CREAT))                                            \
        }                                                                                                              \
        return OPEN_##type(name);                                                                                      \
    }
#define DIR_OF_plain AT_FDCWD
#define DIR_OF_at dir
#define OPEN_plain(name) REAL(name)(path, flags, mode)
#define OPEN_at(name) REAL(name)(dir, path, flags, mode)
OPENS(open, plain, (const char *path, int flags, ...))
OPENS(open64, plain, (const char *path, int flags, ...))
OPENS(openat, at, (int dir, const char *path, int flags, ...))
OPENS(openat64, at, (int dir, const char *path, int flags, ...))

#define STREAMS(name)                                                                                                  \
    NEXT(name)                                                                                                         \
    FILE *name(const char *path, const char *mode) {                                                                   \
        if (mode[0] != 'r' || strchr(mode, '+')) {                                                                     \
            if (decide_at("open", AT_FDCWD, path, 1) != GO_ON) {                                                       \
                errno = failure;                                                                                       \
                return NULL;                                                                                           \
            }                                                                                                          \
        }                                                                                                              \
        return REAL(name)(path, mode);                                                                                 \
    }
STREAMS(fopen)
STREAMS(fopen64)

#define WRITES(name, parameters, half, whole)                                                                          \
    NEXT(name)                                                                                                         \
    ssize_t name parameters {                                                                                          \
        int what = decide_fd("write", fd, 1, 1);                                                                       \
        if (what == HALF_THEN_END) {                                                                                   \
            half;                                                                                                      \
            end();                                                                                                     \
        }                                                                                                              \
        if (what == HALF_THEN_FAIL) half;                                                                              \
        REFUSE(what)                                                                                                   \
        return whole;                                                                                                  \
    }
#define HALF(call) do { ssize_t ignored = call; (void)ignored; } while (0)
WRITES(write, (int fd, const void *data, size_t size), HALF(syscall(SYS_write, fd, data, size / 2)),
       REAL(write)(fd, data, size))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t at), HALF(syscall(SYS_pwrite64, fd, data, size / 2, at)),
       REAL(pwrite)(fd, data, size, at))
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t at),
       HALF(syscall(SYS_pwrite64, fd, data, size / 2, at)), REAL(pwrite64)(fd, data, size, at))
WRITES(writev, (int fd, const struct iovec *parts, int many),
       HALF(many ? syscall(SYS_write, fd, parts->iov_base, parts->iov_len / 2) : 0), REAL(writev)(fd, parts, many))
WRITES(pwritev, (int fd, const struct iovec *parts, int many, off_t at), HALF(0), REAL(pwritev)(fd, parts, many, at))
WRITES(pwritev64, (int fd, const struct iovec *parts, int many, off64_t at), HALF(0),
       REAL(pwritev64)(fd, parts, many, at))

#define COPIES(name, parameters, call)                                                                                 \
    NEXT(name)                                                                                                         \
    ssize_t name parameters {                                                                                          \
        REFUSE(decide_fd("copy", fd, 1, 0))                                                                            \
        return call;                                                                                                   \
    }
COPIES(sendfile, (int fd, int from, off_t *at, size_t size), REAL(sendfile)(fd, from, at, size))
COPIES(sendfile64, (int fd, int from, off64_t *at, size_t size), REAL(sendfile64)(fd, from, at, size))
COPIES(copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags),
       REAL(copy_file_range)(from, at, fd, to, size, flags))

#define ON_FD(name, kind, room, parameters, call)                                                                      \
    NEXT(name)                                                                                                         \
    int name parameters {                                                                                              \
        REFUSE(decide_fd(kind, fd, room, 0))                                                                           \
        return call;                                                                                                   \
    }
ON_FD(fsync, "sync", 1, (int fd), REAL(fsync)(fd))
ON_FD(fdatasync, "sync", 1, (int fd), REAL(fdatasync)(fd))
ON_FD(ftruncate, "cut", 1, (int fd, off_t size), REAL(ftruncate)(fd, size))
ON_FD(ftruncate64, "cut", 1, (int fd, off64_t size), REAL(ftruncate64)(fd, size))
ON_FD(fallocate, "reserve", 1, (int fd, int mode, off_t at, off_t size), REAL(fallocate)(fd, mode, at, size))
ON_FD(fallocate64, "reserve", 1, (int fd, int mode, off64_t at, off64_t size), REAL(fallocate64)(fd, mode, at, size))
ON_FD(fchmod, "mode", 0, (int fd, mode_t mode), REAL(fchmod)(fd, mode))

#define RESERVES(name, type)                                                                                           \
    NEXT(name)                                                                                                         \
    int name(int fd, type at, type size) { /* gives the error back, and leaves errno */                                \
        if (decide_fd("reserve", fd, 1, 0) != GO_ON) return failure;                                                   \
        return REAL(name)(fd, at, size);                                                                               \
    }
RESERVES(posix_fallocate, off_t)
RESERVES(posix_fallocate64, off64_t)

#define ON_PATH(name, kind, room, dir, path, parameters, call)                                                         \
    NEXT(name)                                                                                                         \
    int name parameters {                                                                                              \
        REFUSE(decide_at(kind, dir, path, room))                                                                       \
        return call;                                                                                                   \
    }
ON_PATH(rename, "rename", 0, AT_FDCWD, to, (const char *from, const char *to), REAL(rename)(from, to))
ON_PATH(renameat, "rename", 0, todir, to, (int fromdir, const char *from, int todir, const char *to),
        REAL(renameat)(fromdir, from, todir, to))
ON_PATH(renameat2, "rename", 0, todir, to, (int fromdir, const char *from, int todir, const char *to, unsigned flags),
        REAL(renameat2)(fromdir, from, todir, to, flags))
ON_PATH(unlink, "remove", 0, AT_FDCWD, path, (const char *path), REAL(unlink)(path))
ON_PATH(unlinkat, "remove", 0, dir, path, (int dir, const char *path, int flags), REAL(unlinkat)(dir, path, flags))
ON_PATH(rmdir, "remove", 0, AT_FDCWD, path, (const char *path), REAL(rmdir)(path))
ON_PATH(remove, "remove", 0, AT_FDCWD, path, (const char *path), REAL(remove)(path))
ON_PATH(mkdir, "folder", 1, AT_FDCWD, path, (const char *path, mode_t mode), REAL(mkdir)(path, mode))
ON_PATH(mkdirat, "folder", 1, dir, path, (int dir, const char *path, mode_t mode), REAL(mkdirat)(dir, path, mode))
ON_PATH(truncate, "cut", 1, AT_FDCWD, path, (const char *path, off_t size), REAL(truncate)(path, size))
ON_PATH(truncate64, "cut", 1, AT_FDCWD, path, (const char *path, off64_t size), REAL(truncate64)(path, size))
ON_PATH(link, "link", 1, AT_FDCWD, to, (const char *from, const char *to), REAL(link)(from, to))
ON_PATH(linkat, "link", 1, todir, to, (int fromdir, const char *from, int todir, const char *to, int flags),
        REAL(linkat)(fromdir, from, todir, to, flags))
ON_PATH(symlink, "link", 1, AT_FDCWD, to, (const char *from, const char *to), REAL(symlink)(from, to))
ON_PATH(chmod, "mode", 0, AT_FDCWD, path, (const char *path, mode_t mode), REAL(chmod)(path, mode))
