"""Data files on disk: the endings that tell their kind, and the files that a folder or a pattern means."""

import os
from collections.abc import Iterator
from errno import E2BIG
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
COLUMN_SUFFIXES = (".parquet", ".arrow", ".feather")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PACKED = tuple(text + compression for text in TEXT_SUFFIXES for compression in COMPRESSIONS)
DATA_SUFFIXES = (*TEXT_SUFFIXES, *COLUMN_SUFFIXES, *_PACKED)
KNOWN_SUFFIXES = f"{', '.join(DATA_SUFFIXES[: -len(_PACKED)])}; all but the last three also {', '.join(COMPRESSIONS)}"
"""`DATA_SUFFIXES` in few words."""
# What is looked at before a walk is given up: rows do not lie in so many files, but `/` and a home folder hold more.
_MOST = 100_000


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
    waiting = [pattern_start(path) if is_pattern(path) else (path, ("**",))]
    examined, seen = 0, set[Any]()
    while waiting:  # a stack, since folders may be thousands of levels deep
        folder, (part, *rest) = waiting.pop()
        status = os.stat(folder) if _is_folder(folder) else None  # noqa: PTH116
        if status is None or (status.st_dev, status.st_ino, part, *rest) in seen:  # a link may lead back up
            continue
        seen.add((status.st_dev, status.st_ino, part, *rest))
        deeper = part == "**"  # this folder, and every one below
        if deeper:
            waiting.append((folder, tuple(rest) or ("*",)))
        with os.scandir(folder) as entries:
            for entry in entries:
                examined += 1
                if examined > _MOST:
                    raise TooManyFiles(E2BIG, f"more than {_MOST:,} files and folders lie there")
                name, pattern = folder / entry.name, "*" if deeper else part
                if entry.name.startswith(".") != pattern.startswith(".") or not fnmatchcase(entry.name, pattern):
                    continue
                if _is_folder(name):
                    waiting += [(name, (part, *rest) if deeper else tuple(rest))] if deeper or rest else []
                elif not deeper and not rest and data_suffix(entry.name) and name not in seen:
                    seen.add(name)
                    yield name


def pattern_start(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder where a pattern begins, the longest part of it that exists as written, and the parts after it."""
    root, parts = Path(path.anchor), path.parts[len(Path(path.anchor).parts) :]
    while parts and os.path.lexists(root / parts[0]):
        root, parts = root / parts[0], parts[1:]
    return root, parts


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises for links and folders that it may not follow)
