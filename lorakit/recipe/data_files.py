"""Data files on disk: the endings that tell their kind, and the files that a folder or a pattern means."""

import os
from collections.abc import Iterator
from errno import E2BIG, ENAMETOOLONG
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
# What a walk looks at before it is given up: rows do not lie in so many files, but `/` and a home folder hold more.
_MOST, _MOST_PARTS = 100_000, 64


def data_suffix(name: str) -> str:
    """The ending that tells the kind of a data file, as `.jsonl` or `.csv.gz`; empty when the name has none."""
    name = name.lower()
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), "")


def is_pattern(path: str | Path) -> bool:
    """Whether `*`, `?` or `[` stand in a path that does not exist as it is written."""
    return any(sign in str(path) for sign in "*?[") and not os.path.lexists(path)


class TooManyFiles(OSError):
    """A folder or pattern for which more would have to be looked at than rows lie in."""


def data_files(path: Path) -> Iterator[Path]:
    """The data files below a folder, or those that a pattern matches, in no order.

    Hidden files and folders are left out unless the pattern begins with the dot, and so are unknown endings. Links to
    folders are followed, each folder once. A file that cannot be read is among them: its reader says why.

    Raises:
        OSError: a folder cannot be listed.
        TooManyFiles: more than 100,000 files and folders lie there.
    """
    walk = _Walk()
    if is_pattern(path):
        root, parts = pattern_start(path)
        files = walk.matching(root, parts)
    else:
        files = (file for folder in walk.folders(path) for file in walk.files(folder, "*"))
    seen = set()
    for file in files:
        if data_suffix(file.name) and file not in seen:
            seen.add(file)
            yield file


def pattern_start(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder where a pattern begins, the longest part of it that exists as written, and the parts after it."""
    root, parts = Path(path.anchor), path.parts[len(Path(path.anchor).parts) :]
    while parts and os.path.lexists(root / parts[0]):
        root, parts = root / parts[0], parts[1:]
    return root, parts


class _Walk:
    """A walk through folders, which counts what it looks at."""

    def __init__(self) -> None:
        self._examined = 0

    def matching(self, root: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """What lies below a folder and fits a pattern's parts."""
        if len(parts) > _MOST_PARTS:
            raise TooManyFiles(ENAMETOOLONG, f"a pattern of more than {_MOST_PARTS} folders")
        part, rest = parts[0], parts[1:]
        if part == "**":
            for folder in self.folders(root):
                yield from self.matching(folder, rest or ("*",))
        elif rest:
            for name, is_folder in self._names(root, part):
                if is_folder:
                    yield from self.matching(root / name, rest)
        else:
            yield from self.files(root, part)

    def folders(self, root: Path) -> Iterator[Path]:
        """`root` and every folder below it that is not hidden; a stack, since folders may be thousands of levels
        deep."""
        waiting, seen = [root], set()
        while waiting:
            folder = waiting.pop()
            status = folder.stat()
            if (status.st_dev, status.st_ino) not in seen:  # a link may lead back up
                seen.add((status.st_dev, status.st_ino))
                yield folder
                waiting += [folder / name for name, is_folder in self._names(folder, "*") if is_folder]

    def files(self, folder: Path, pattern: str) -> Iterator[Path]:
        """What lies in a folder and is none itself."""
        return (folder / name for name, is_folder in self._names(folder, pattern) if not is_folder)

    def _names(self, folder: Path, pattern: str) -> list[tuple[str, bool]]:
        """The names in a folder that fit, and whether each is a folder."""
        if not _is_folder(folder):
            return []
        hidden, names = pattern.startswith("."), []
        with os.scandir(folder) as entries:
            for entry in entries:
                self._examined += 1
                if self._examined > _MOST:
                    raise TooManyFiles(E2BIG, f"more than {_MOST:,} files and folders lie there")
                if entry.name.startswith(".") == hidden and fnmatchcase(entry.name, pattern):
                    names.append(
                        (entry.name, _is_folder(folder / entry.name) if entry.is_symlink() else entry.is_dir())
                    )
        return names


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises for links and folders that it may not follow)
