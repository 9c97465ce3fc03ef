"""A program of its own: runs Python that a model wrote, confined by the kernel, and says whether it came to its end.

Started by confined_code.py. Standard input: a line with a password, then the code. Written to the descriptor `answers`:
a byte once the code begins, then the password if the code ended without an exception. The process can read files and
compute. It cannot write or create a file, open a connection, start a program or a process, or send a signal: the kernel
refuses these system calls, however they are made.
"""

import errno
import fcntl
import os
import resource
import sys
from typing import Any

from seccompy import Action, CmpOp, Filter

MEMORY = 2 << 30
"""Bytes of address space."""
_THREAD = 0x10000  # CLONE_THREAD
_WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLOSE_ON_EXEC = 0x5451  # FIOCLEX, by which Python marks what it opens
# Of fcntl's commands these alone: F_SETOWN, among others, sends signals to other processes.
_FCNTL = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL)
# What computing, reading files and threads need. All else is refused.
_ALLOWED = """
brk clock_getres clock_gettime clock_nanosleep close dup dup2 dup3 epoll_create1 epoll_ctl epoll_pwait epoll_wait
eventfd2 exit exit_group fadvise64 fstat futex get_robust_list getcpu getcwd getdents64 getegid geteuid getgid
getpgrp getpid getppid getrandom getresgid getresuid getrlimit getrusage gettid gettimeofday getuid lseek lstat madvise
membarrier mincore mmap mprotect mremap munmap nanosleep newfstatat pipe2 poll ppoll pread64 preadv pselect6 read
readlink readlinkat readv restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn sched_getaffinity sched_yield
select set_robust_list setitimer sigaltstack stat statx sysinfo time times uname write writev access faccessat
faccessat2
"""


def confine(seconds: int) -> None:
    """Put this process and its threads under the limits, for good. `seconds`: of processor time. An OSError where the
    kernel has no such filter."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(limit)[1]
        lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lowered, lowered))
    rules = Filter(default=Action.ERRNO | errno.EPERM)
    for name in _ALLOWED.split():
        try:
            rules.allow(name)
        except ValueError:
            continue  # this kind of processor has no such call
    rules.allow("openat", args=[(2, CmpOp.MASKED_EQ, 0, _WRITES)])
    rules.allow("clone", args=[(0, CmpOp.MASKED_EQ, _THREAD, _THREAD)])
    rules.errno("clone3", errno.ENOSYS)  # its flags cannot be seen; the C library takes clone then
    rules.allow("ioctl", args={1: _CLOSE_ON_EXEC})
    for command in _FCNTL:
        rules.allow("fcntl", args={1: command})
    rules.load()


def main(answers: int, seconds: int) -> None:
    password, _, code = sys.stdin.buffer.read().partition(b"\n")
    confine(seconds)
    os.write(answers, b".")
    scope: dict[str, Any] = {}
    exec(compile(code, "<answer>", "exec"), scope)
    os.write(answers, password)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
