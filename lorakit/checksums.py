"""Checksums of what a cache holds: files that changed in place are noticed before they are used.

XXH3 does not protect against a forger, who could write new checksums as well; it reads a GB in half a second.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash

_NAME = ".checksums"  # without an ending: no reader of a model's folder takes it for a file of the model


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder's files into it."""
    (folder / _NAME).write_text(json.dumps(_checksums(folder)), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What changed in a cache folder since its checksums were written, in words; None where nothing did."""
    if not folder.exists():
        return None
    try:
        written = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "it has no readable checksums"
    current = _checksums(folder)
    if not isinstance(written, dict) or written.keys() != current.keys():
        return "files are missing or were added"
    return next((f"{name} has changed" for name, checksum in current.items() if checksum != written[name]), None)


def _checksums(folder: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            checksums[path.name] = str(path.readlink())
        elif path.is_file() and path.name != _NAME:
            with path.open("rb", buffering=0) as file:  # not mapped: a map's pages count as this process's memory
                checksums[path.name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return checksums


def encode_line(facts: Any) -> str:
    """Facts as one line of JSON with their checksum."""
    text = json.dumps(facts)
    return f'[{text}, "{xxhash.xxh3_64_hexdigest(text.encode())}"]'


def decode_line(line: str | bytes) -> Any:
    """The facts of a line; ValueError where it is cut short or has changed."""
    try:
        facts, checksum = json.loads(line)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if xxhash.xxh3_64_hexdigest(json.dumps(facts).encode()) != checksum:
        raise ValueError("the line does not match its checksum")
    return facts
