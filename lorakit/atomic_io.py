"""Files and folders that are complete or absent, their locks, and lorakit's cache."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import LorakitError, UserError

LOCK = ".lorakit-lock"
"""The lock file in a run's folder; that of another folder lies beside it, named after both."""
_DRAFT = ".lorakit-draft."
_UNSETTLED = 2_000_000_000  # nanoseconds; the coarsest clock of a file system in use, FAT's, counts two seconds
_OPEN_LOCKS: set[int] = set()


def cache_folder() -> Path:
    """The user's cache for lorakit: `$LORAKIT_CACHE`, else `lorakit` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


@contextmanager
def atomic_dir(final: Path, first_wins: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `final` at the end, and vanishes when the writing fails.

    An existing `final` is replaced at that moment; with `first_wins` it stays, since another process has written the
    same meanwhile. After a power cut the name holds the old folder, the new one, or nothing.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{final.name}.", dir=final.parent))
    try:
        yield draft
        _set_modes_and_sync(draft)
        if final.exists() and not first_wins:
            remove_folder(final)
        try:
            draft.rename(final)
        except OSError:
            if not (first_wins and final.is_dir()):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _set_modes_and_sync(folder: Path) -> None:
    """Give everything in a draft the modes that the umask allows, and flush it to disk.

    safetensors and Python make temporary files and folders that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():  # what it leads to is another's
            continue
        special = path.stat().st_mode & 0o7000  # such as a folder that passes on its group
        path.chmod(special | ((0o777 if path.is_dir() else 0o666) & ~umask))
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(final: Path, text: str) -> None:
    """Write a text file that is the old one or the new one at every moment."""
    with atomic_file(final) as file:
        file.write(text.encode())


@contextmanager
def atomic_file(final: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `final` at the end, and vanishes when the writing fails."""
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f"{_DRAFT}{final.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(final)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def claim_name(final: Path) -> Iterator[None]:
    """While this process writes files of a new name, no other takes that name (FileExistsError)."""
    claim = final.with_name(f"{_DRAFT}{final.name}.claim")
    os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder that is never seen half deleted under its name."""
    trash = Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{folder.name}.", dir=folder.parent))
    folder.rename(trash / folder.name)
    shutil.rmtree(trash)


def is_draft(path: Path) -> bool:
    """Whether a path is a draft or a lock of this module."""
    return path.name.startswith((_DRAFT, LOCK))


def remove_drafts(parent: Path, name: str = "") -> None:
    """Delete what killed writers of this module left in `parent`; with `name`, only drafts of that folder."""
    pattern = re.escape(f"{_DRAFT}{name}.") + "[^.]+" if name else re.escape(_DRAFT) + ".*"
    for draft in [path for path in parent.glob("*") if re.fullmatch(pattern, path.name)]:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def refuse_pipes(folder: Path) -> None:
    """Refuse a folder in which a file is a pipe or a device: a library that reads it could wait for ever."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a pipe or a device, not a file. Put the file itself there.")


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a file of a folder is in it, not a link to somewhere else.

    A snapshot in the hub's cache consists of links to the `blobs` beside it (models--ORG--NAME/snapshots/COMMIT).
    """
    target, inside = path.resolve(), folder.resolve()
    if target.is_relative_to(inside):
        return True
    repository = inside.parent.parent
    is_snapshot = inside.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
    return is_snapshot and target.parent == repository / "blobs"


def read_own_json(file: Path) -> dict[str, Any]:
    """The JSON document that marks a folder as written by lorakit; UserError where there is no such document."""
    facts = read_json_object(file)
    if facts and isinstance(facts.get("versions"), dict) and "format" in facts:
        return facts
    raise UserError(
        f"{file.parent}: exists, and has no {file.name} from lorakit, so lorakit did not write it and does not replace "
        "it. Choose another with --output."
    )


def read_json_object(file: Path) -> dict[str, Any] | None:
    """The mapping that a JSON file holds; None where it is missing, damaged or holds none."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def files_in(folder: Path) -> list[str]:
    """The files below a folder, by their paths in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def refuse_other_files(folder: Path, written: Any) -> None:
    """Refuse to replace a folder that has other files than those listed as written; None: no list exists yet."""
    files = files_in(folder)
    known = files if written is None else written if isinstance(written, list) else []
    for name in files:
        if name not in known and not is_draft(Path(name)):
            raise UserError(f"{folder / name}: lorakit did not write it. Move it away, or choose another --output.")


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, read once in a process as long as nothing about the file changes."""
    status = path.stat()
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - changed < _UNSETTLED:  # it could change again without a later time
        return _digest.__wrapped__(path)
    return _digest(path.resolve(), status.st_dev, status.st_ino, status.st_size, changed)


@functools.cache
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exclusive_lock(output: Path) -> AbstractContextManager[None]:
    """While this process decides about, makes and puts in place the folder `output`, no other does (UserError)."""
    return _lock_of_folder(output, shared=False)


def shared_lock(folder: Path) -> AbstractContextManager[None]:
    """While processes read a folder, none that holds `exclusive_lock` may replace it (UserError)."""
    return _lock_of_folder(folder, shared=True)


def _lock_of_folder(folder: Path, shared: bool) -> AbstractContextManager[None]:
    path = folder.absolute()
    doing = "writing this folder" if shared else "writing this folder, or reads it"
    refusal = f"{folder}: another process is {doing}. Wait, or stop it."
    return file_lock(path.with_name(f"{LOCK}.{path.name}"), refusal, shared)


@contextmanager
def file_lock(lock: Path, refusal: str, shared: bool = False) -> Iterator[None]:
    """Lock a file: alone, or `shared` with others that share it, which goes on without a lock where it may not write.

    The system keeps the lock (flock, which NFS passes on to its server) and drops it with the process.

    Raises:
        UserError: another process has the lock; the message is `refusal`.
        LorakitError: the file system does not support locks.
    """
    handle = None
    while handle is None or not _is_at(handle, lock):  # the process that had it may have removed the file meanwhile
        if handle is not None:
            os.close(handle)
        handle = _lock(lock, refusal, shared)
        if handle is None:
            yield
            return
    _OPEN_LOCKS.add(handle)
    try:
        yield
    finally:
        _OPEN_LOCKS.discard(handle)
        with contextlib.suppress(OSError):  # others share it, or the folder is gone: then the file stays
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, lock):
                lock.unlink()
        os.close(handle)


def is_locked(lock: Path) -> bool:
    """Whether another process has locked this file for itself alone, at this moment."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of this name would be waited for
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(handle)
    return False


def _lock(lock: Path, refusal: str, shared: bool) -> int | None:
    """A handle of the lock file that has the lock; None where it cannot be locked, and sharing needs no lock."""
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
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(refusal) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        if shared:
            return None
        raise LorakitError(
            f"{lock.parent}: its file system does not support locks ({error.strerror}), so two runs could write into "
            "one folder. Choose a folder on another one with --output."
        ) from error
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _close_locks() -> None:
    """A forked worker that outlives its parent must not keep the parent's locks."""
    for handle in _OPEN_LOCKS:
        os.close(handle)
    _OPEN_LOCKS.clear()


os.register_at_fork(after_in_child=_close_locks)
