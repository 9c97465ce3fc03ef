"""Data files on disk: the endings that tell their kind, and the files that a folder or a pattern means."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
COLUMN_SUFFIXES = (".parquet", ".arrow", ".feather")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DATA_SUFFIXES = (
    *TEXT_SUFFIXES,
    *COLUMN_SUFFIXES,
    *(text + compression for text in TEXT_SUFFIXES for compression in COMPRESSIONS),
)
KNOWN_SUFFIXES = (
    f"{', '.join((*TEXT_SUFFIXES, *COLUMN_SUFFIXES))}; all but the last three also {', '.join(COMPRESSIONS)}"
)
"""`DATA_SUFFIXES` in few words."""


def data_suffix(name: str) -> str:
    """The ending that tells the kind of a data file, as `.jsonl` or `.csv.gz`; empty when the name has none."""
    name = name.lower()
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), "")


def is_pattern(path: str | Path) -> bool:
    """Whether `*`, `?` or `[` stand in a path that does not exist as it is written."""
    return any(sign in str(path) for sign in "*?[") and not os.path.lexists(path)


def data_files(path: Path) -> Iterator[Path]:
    """The data files below a folder, or those that a pattern matches, in no order.

    Hidden files and folders are left out unless the pattern begins with the dot, and so are unknown endings. Links to
    folders are followed, each folder once. A file that cannot be read is among them: its reader says why.

    Raises:
        OSError: a folder cannot be listed.
    """
    if is_pattern(path):
        root, parts = pattern_start(path)
        found = dict.fromkeys(_matching(root, parts))
    else:
        found = dict.fromkeys(file for folder in _folders(path) for file in _files(folder, "*"))
    yield from (file for file in found if data_suffix(file.name))


def pattern_start(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder where a pattern begins, the longest part of it that exists as it is written, and the parts behind."""
    root, parts = Path(path.anchor), path.parts[len(Path(path.anchor).parts) :]
    while parts and os.path.lexists(root / parts[0]):
        root, parts = root / parts[0], parts[1:]
    return root, parts


def _matching(root: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        for folder in _folders(root):
            yield from _matching(folder, rest or ("*",))
    elif rest:
        for name in _names(root, part):
            if _is_folder(root / name):
                yield from _matching(root / name, rest)
    else:
        yield from _files(root, part)


def _folders(root: Path) -> Iterator[Path]:
    """`root` and every folder below it that is not hidden; a stack, since folders may be thousands of levels deep."""
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) not in seen:  # a link may lead back up
            seen.add((status.st_dev, status.st_ino))
            yield folder
            waiting += [folder / name for name in _names(folder, "*") if _is_folder(folder / name)]


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    return (folder / name for name in _names(folder, pattern) if not _is_folder(folder / name))


def _names(folder: Path, pattern: str) -> list[str]:
    if not _is_folder(folder):
        return []
    hidden = pattern.startswith(".")
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    return [name for name in names if name.startswith(".") == hidden and fnmatchcase(name, pattern)]


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises for links and folders that it may not follow)
