"""What models said and lost on rows, kept by content: nothing is computed twice, and an interrupted evaluation goes on.

A file of JSON lines for each model and way of asking, named by the sha256 of all that decides the result; a line for
each row, named by the sha256 of its tokens, with a checksum. Lines are added and flushed as batches are done.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import lorakit
from lorakit.atomic_io import cache_folder
from lorakit.checksums import decode_line, encode_line
from lorakit.errors import LorakitError
from lorakit.evaluate.generate import Answer

_VERSION = 2
"""Of what is kept. It grows when older lines may hold figures that are wrong: they are not read any more."""


@dataclass
class CacheFile:
    """The lines of one file by the sha256 of their row; without a path nothing is kept."""

    path: Path | None
    lines: dict[str, Any] = field(default_factory=dict)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep more lines, on disk before this returns.

        Raises:
            LorakitError: the cache cannot be written.
        """
        self.lines |= found
        if self.path is None or not found:
            return
        text = "".join(encode_line([name, value]) + "\n" for name, value in found.items())
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error


def open_cache(kind: str, facts: Mapping[str, Any], use: bool = True) -> CacheFile:
    """The file of a `kind`, a folder of the cache, that belongs to these facts. `use`: False keeps nothing.

    Raises:
        LorakitError: the cache cannot be read or written.
    """
    if not use:
        return CacheFile(None)
    packages = (lorakit, torch, transformers)
    versions = {package.__name__: package.__version__ for package in packages}
    name = _digest({**facts, **versions, "version": _VERSION})
    path = cache_folder() / kind / f"{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        if data and not data.endswith(b"\n"):  # a killed process left half a line, which must not spoil the next
            with path.open("ab") as file:
                file.write(b"\n")
    except OSError as error:
        raise _unwritable(path, error) from error
    lines: dict[str, Any] = {}
    for line in data.splitlines():
        try:
            row, value = decode_line(line)
        except (ValueError, TypeError):
            continue  # cut short by a crash, or changed since: its row is computed again
        lines[row] = value
    return CacheFile(path, lines)


def get_or_compute(
    kept: CacheFile, names: Sequence[str], compute: Callable[[list[int], Callable[[Mapping[int, Any]], None]], None]
) -> list[Any]:
    """A value for each name: the one that is kept, or what `compute` finds.

    `compute` gets the positions of the names that are not kept, each name once, and a function that it tells values
    by position; it is not called when all are there.
    """
    missing = list({name: at for at, name in enumerate(names) if name not in kept.lines}.values())
    if missing:
        compute(missing, lambda found: kept.add({names[at]: value for at, value in found.items()}))
    return [kept.lines[name] for name in names]


def row_key(row: Mapping[str, Any]) -> str:
    """The sha256 of a row's tokens and labels."""
    return _digest([list(row["input_ids"]), list(row["labels"])])


def prompt_key(prompt: Sequence[int]) -> str:
    """The sha256 of a prompt's tokens."""
    return _digest(list(prompt))


def as_line(answer: Answer) -> list[Any]:
    """An answer as it is kept."""
    return [list(answer.tokens), answer.ended]


def from_line(value: Any) -> Answer:
    """An answer as it was kept."""
    tokens, ended = value
    return Answer(tuple(tokens), bool(ended))


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _unwritable(path: Path, error: OSError) -> LorakitError:
    return LorakitError(
        f"{path.parent}: the cache cannot be written: {error.strerror or error}. Set LORAKIT_CACHE to a folder that "
        "can, or write --no-cache."
    )
