"""Locks of folders: one process writes, or several read."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import LorakitError, UserError

LOCK = ".lorakit-lock"
"""The lock file of a run, in its folder; that of another folder lies beside it, with its name behind this one."""


@contextmanager
def file_lock(lock: Path, refusal: str, shared: bool = False) -> Iterator[None]:
    """Hold a lock file: alone, or `shared` with others that share it. Processes that end without a word leave none.

    The system keeps the lock (flock, which NFS passes on to its server) and drops it with the process, so a file that
    is left behind stops nobody. Whoever may not write where it lies reads there without one.

    Raises:
        UserError: another process holds it; the message is `refusal`.
        LorakitError: the file system keeps no locks.
    """
    handle = _lock(lock, refusal, shared)
    if handle is None:
        yield
        return
    _HELD.add(handle)
    try:
        yield
    finally:
        _HELD.discard(handle)
        with contextlib.suppress(OSError):  # others share it, or the folder is gone: then the file stays
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, lock):
                lock.unlink()
        os.close(handle)


def _lock(lock: Path, refusal: str, shared: bool) -> int | None:
    """A handle of the lock file that has the lock; None where nobody can lock, and sharing needs none."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if not (shared and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)):
                raise
            if not lock.exists():
                return None
            handle = os.open(lock, os.O_RDONLY)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_at(handle, lock):
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(refusal) from error
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                if shared:
                    return None
                raise LorakitError(
                    f"{lock.parent}: its file system keeps no locks ({error.strerror}), so that two runs could write "
                    "into one folder. Choose a folder on another one with --output."
                ) from error
            if error.errno != errno.ESTALE:
                raise
        else:
            os.close(handle)  # its holder has removed it meanwhile


def _is_at(handle: int, path: Path) -> bool:
    """Whether a path still names the open file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


_HELD: set[int] = set()


def _close_held() -> None:
    """A forked worker that outlives us must not hold our locks."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_held)


@contextmanager
def exclusive_lock(output: Path) -> Iterator[None]:
    """While this process decides about, makes and puts in place the folder `output` no other does.

    Raises:
        UserError: another one does.
    """
    place = output.absolute()
    refusal = f"{output}: another process is writing this folder. Wait, or stop it."
    with file_lock(place.with_name(f"{LOCK}.{place.name}"), refusal):
        yield
