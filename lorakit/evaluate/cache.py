"""What models computed on rows, kept by content: nothing is computed twice, and an interrupted evaluation goes on.

A file of JSON lines for each model and kind of result, named by the sha256 of all that decides the result. A line for
each row, named by the sha256 of its tokens, with a checksum. Lines are added and flushed after each batch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import lorakit
from lorakit.atomic_io import cache_folder
from lorakit.checksums import decode_line, encode_line
from lorakit.errors import LorakitError

_VERSION = 2
"""Raise it when older lines may hold wrong figures: they are then not read any more."""

Save = Callable[[Mapping[int, Any]], None]
"""Saves values by the position of their key among the missing ones."""


@dataclass
class CacheFile:
    """The values of one file by the sha256 of their row. Without a path nothing is written."""

    path: Path | None
    lines: dict[str, Any] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any]) -> None:
        """Add values; they are on disk when this returns."""
        self.lines |= values
        if self.path is None or not values:
            return
        text = "".join(encode_line([name, value]) + "\n" for name, value in values.items())
        with _writing(self.path), self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def open_cache(kind: str, facts: Mapping[str, Any], use: bool = True) -> CacheFile:
    """The file of these facts in the cache's folder for a `kind`. With `use` False nothing is read or written."""
    if not use:
        return CacheFile(None)
    versions = {package.__name__: package.__version__ for package in (lorakit, torch, transformers)}
    path = cache_folder() / kind / f"{digest({**facts, **versions, 'version': _VERSION})}.jsonl"
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        if data and not data.endswith(b"\n"):  # a killed process left half a line, which must not spoil the next
            with path.open("ab") as file:
                file.write(b"\n")
    lines: dict[str, Any] = {}
    for line in data.splitlines():
        try:
            name, value = decode_line(line)
        except (ValueError, TypeError):
            continue  # cut short by a crash, or changed since: its row is computed again
        lines[name] = value
    return CacheFile(path, lines)


def get_or_compute(file: CacheFile, keys: Sequence[str], compute: Callable[[list[int], Save], None]) -> list[Any]:
    """A value for each key: from the file, or what `compute` finds.

    `compute` gets the positions of the keys that are missing, each key once. It is not called if none is missing.
    """
    missing = list({key: at for at, key in enumerate(keys) if key not in file.lines}.values())
    if missing:
        compute(missing, lambda values: file.add({keys[missing[at]]: value for at, value in values.items()}))
    return [file.lines[key] for key in keys]


def digest(facts: Any) -> str:
    """The sha256 of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LorakitError(
            f"{path.parent}: the cache cannot be written: {error.strerror or error}. Set LORAKIT_CACHE to a folder "
            "that can, or write --no-cache."
        ) from error
