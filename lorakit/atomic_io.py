"""Files and folders that are complete or absent, and where lorakit keeps what it can make again."""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import UserError
from lorakit.locks import LOCK

_BLOCK = 1 << 20
_UNSETTLED = 2_000_000_000
"""Nanoseconds; the coarsest clock of a file system in use, FAT's, counts two seconds."""
_DRAFT = ".lorakit-draft."


def cache_folder() -> Path:
    """The user's cache for lorakit: `$LORAKIT_CACHE`, else `lorakit` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("LORAKIT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


@contextmanager
def atomic_dir(final: Path, first_wins: bool = False) -> Iterator[Path]:
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
    """While this process writes files of a new name no other one chooses it; a killed one leaves a draft.

    Raises:
        FileExistsError: another one has chosen it.
    """
    claim = final.with_name(f"{_DRAFT}{final.name}.claim")
    os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder that is never seen half deleted under its name."""
    doomed = Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{folder.name}.", dir=folder.parent))
    folder.rename(doomed / folder.name)
    shutil.rmtree(doomed)


def is_draft(path: Path) -> bool:
    """Whether a path is what a writer of this module left, or is writing: a draft or a lock."""
    return path.name.startswith((_DRAFT, LOCK))


def remove_drafts(parent: Path, name: str = "") -> None:
    """Delete what killed writers of this module left in `parent`; with `name`, only drafts of that folder."""
    ours = re.escape(f"{_DRAFT}{name}.") + "[^.]+" if name else re.escape(_DRAFT) + ".*"
    for draft in parent.iterdir() if parent.is_dir() else ():
        if re.fullmatch(ours, draft.name) and draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        elif re.fullmatch(ours, draft.name):
            draft.unlink(missing_ok=True)


def refuse_pipes(folder: Path) -> None:
    """Refuse a folder in which a file is a pipe or a device: a library that reads it could wait for ever.

    Raises:
        UserError: it names the first.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a pipe or a device, not a file. Put the file itself there.")


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


def read_own_json(file: Path) -> dict[str, Any]:
    """The JSON document by which a folder of lorakit's is known.

    Raises:
        UserError: there is none, or it is another program's.
    """
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        facts = None
    if not (isinstance(facts, dict) and isinstance(facts.get("versions"), dict) and "format" in facts):
        raise UserError(
            f"{file.parent}: is there, and holds no {file.name} of lorakit's, so lorakit did not write it and does not "
            "replace it. Choose another with --output."
        )
    return facts


def files_in(folder: Path) -> list[str]:
    """The files below a folder, by their paths in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def refuse_other_files(folder: Path, written: Any) -> None:
    """Refuse a folder that is to be replaced and holds other files than its facts list; None: they cannot yet.

    Raises:
        UserError: it names the first.
    """
    known = files_in(folder) if written is None else written if isinstance(written, list) else []
    other = [name for name in files_in(folder) if name not in known and not is_draft(Path(name))]
    if other:
        raise UserError(f"{folder / other[0]}: lorakit did not write it. Move it away, or choose another --output.")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read once in a process as long as nothing about it changes.

    No name is taken for it, though the hub's cache has such names: a file may have changed since, or somebody else may
    have named it.
    """
    status = path.stat()
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - changed < _UNSETTLED:  # it could change again without a later time
        return _digest(path)
    return _kept_digest(path.resolve(), status.st_dev, status.st_ino, status.st_size, changed)


@functools.cache
def _kept_digest(path: Path, *_: int) -> str:
    return _digest(path)


def _digest(path: Path) -> str:
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
