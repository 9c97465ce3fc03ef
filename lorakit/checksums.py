"""Checksums of what a cache holds: files that changed in place are noticed before they are used.

XXH3 is no protection against a forger, who could write new checksums as well; it reads a GB in half a second.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

_NAME = ".checksums"  # without an ending: no reader of a model's folder takes it for a file of the model
_BLOCK = 1 << 20


def write_checksums(folder: Path) -> None:
    """Write beside the files of a folder what each of them holds."""
    (folder / _NAME).write_text(json.dumps(_checksums(folder)), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What of a folder of the cache is not as it was when its checksums were written, in words; None where all is, or
    where there is no such folder.

    Raises:
        OSError: a file cannot be read.
    """
    if not folder.exists():
        return None
    try:
        written = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "it has no readable checksums"
    found = _checksums(folder)
    if not isinstance(written, dict) or written.keys() != found.keys():
        return "files are missing or were added"
    changed = [name for name, checksum in found.items() if checksum != written[name]]
    return f"{changed[0]} has changed" if changed else None


def encode_line(facts: Any) -> str:
    """Facts as one line of JSON with their checksum."""
    text = json.dumps(facts)
    return f'[{text}, "{xxhash.xxh3_64_hexdigest(text.encode())}"]'


def decode_line(line: str | bytes) -> Any:
    """The facts of a line.

    Raises:
        ValueError: it is cut short, or has changed.
    """
    try:
        facts, checksum = json.loads(line)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if xxhash.xxh3_64_hexdigest(json.dumps(facts).encode()) != checksum:
        raise ValueError("the line is not what its checksum says")
    return facts


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != _NAME}


def _checksum(path: Path) -> str:
    found = xxhash.xxh3_128()
    # Read, not mapped: pages of a map would count as this process's memory.
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            found.update(memoryview(buffer)[:length])
    return found.hexdigest()
