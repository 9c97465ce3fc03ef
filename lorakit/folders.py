"""Files and folders that are complete or absent, and where lorakit keeps what it can make again."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from lorakit.errors import UserError

_BLOCK = 1 << 20
_DRAFT = ".lorakit-draft."


def cache_folder() -> Path:
    """The user's cache for lorakit: `$LORAKIT_CACHE`, else `lorakit` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("LORAKIT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


@contextmanager
def whole_folder(final: Path, first_wins: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `final` at the end, and vanishes when the writing fails.

    An existing `final` is replaced at that moment, never before; with `first_wins` it stays, since another process has
    written the same meanwhile. Everything is flushed to disk first, so that after a power cut the name holds the old
    folder, the new one, or nothing.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{final.name}.", dir=final.parent))
    try:
        yield draft
        _seal(draft)
        if final.exists() and not first_wins:
            remove_folder(final)
        try:
            draft.rename(final)
        except OSError:
            if not (first_wins and final.is_dir()):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """While this process writes into a folder no other may.

    Raises:
        UserError: another one does; `doing` says what, such as "training into".
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    path = cache_folder() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process is {doing} this folder. Wait, or stop it.") from error
    try:
        yield
    finally:
        lock.release()


def write_whole(final: Path, text: str) -> None:
    """Write a text file that is the old one or the new one at every moment."""
    with whole_file(final) as file:
        file.write(text.encode())


@contextmanager
def whole_file(final: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `final` at the end, and vanishes when the writing fails."""
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(final)
    finally:
        draft.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder that is never seen half deleted under its name."""
    doomed = Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{folder.name}.", dir=folder.parent))
    folder.rename(doomed / folder.name)
    shutil.rmtree(doomed)


def is_draft(path: Path) -> bool:
    """Whether a path is what a writer of this module left, or is writing."""
    return path.name.startswith(_DRAFT)


def remove_drafts(parent: Path, name: str = "") -> None:
    """Delete what killed writers of this module left in `parent`; with `name`, only drafts of that folder."""
    ours = re.escape(f"{_DRAFT}{name}.") + "[^.]+" if name else re.escape(_DRAFT) + ".*"
    for draft in parent.iterdir() if parent.is_dir() else ():
        if re.fullmatch(ours, draft.name):
            shutil.rmtree(draft, ignore_errors=True)


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a file of a folder lies in it, and is no link to somewhere else.

    A snapshot in the hub's cache consists of links to the `blobs` beside it (models--ORG--NAME/snapshots/COMMIT).
    """
    target, inside = path.resolve(), folder.resolve()
    if target.is_relative_to(inside):
        return True
    repository = inside.parent.parent
    is_snapshot = inside.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
    return is_snapshot and target.parent == repository / "blobs"


def sha256_of(path: Path) -> str:
    """The sha256 of a file. The hub's cache names its large files by their sha256: there it is taken as read."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _seal(folder: Path) -> None:
    """Give all in a draft the modes of files that are simply created, whatever wrote them, and flush it to disk.

    safetensors writes through a temporary file, which only its owner can read, and Python makes such folders.
    """
    allowed = ~_umask()
    for path in [*folder.rglob("*"), folder]:
        kept = path.stat().st_mode & 0o7000  # a folder that hands its group on
        path.chmod(kept | ((0o777 if path.is_dir() else 0o666) & allowed))
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
