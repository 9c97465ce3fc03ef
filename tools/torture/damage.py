"""A folder of files with one or two of them damaged: in their values, their bytes, or as files."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

from tools.torture.mutate import bad_value, mutate_bytes, mutate_value


def damage(
    chance: random.Random, folder: Path, names: list[str] | None = None, values: bool = True, pipes: bool = True
) -> list[str]:
    """Damage files of a folder, those of these names or any; what was done to which. `values`: JSON as JSON too.
    `pipes`: a file may become one, as in folders that come from somebody else."""
    done = []
    for _ in range(chance.choice([1, 1, 2])):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
        files = [path for path in files if names is None or path.name in names] or files
        if files:
            path = chance.choice(files)
            done.append(f"{path.relative_to(folder)}: {_damage_file(chance, path, values, pipes)}")
    return done


def _damage_file(chance: random.Random, path: Path, values: bool, pipes: bool) -> str:
    way = chance.random()
    if way < 0.15:
        return _as_a_file(chance, path, pipes)
    raw = path.read_bytes()
    try:
        if path.suffix == ".safetensors" and way < 0.7:
            path.write_bytes(_header(chance, raw))
            return "header"
        if path.suffix == ".json" and values and way < 0.75:
            value = mutate_value(chance, json.loads(raw), chance.randint(1, 3))
            path.write_text(json.dumps(value), encoding="utf-8")
            return "values"
    except (ValueError, TypeError, AttributeError, IndexError, struct.error):
        pass  # damaged once already, so that it says nothing any more
    path.write_bytes(mutate_bytes(chance, raw))
    return "bytes"


def _as_a_file(chance: random.Random, path: Path, pipes: bool) -> str:
    way = chance.choice(
        ["missing", "empty", "cut", "a folder", "a pipe", "a link nowhere", "a link to itself", "zeros"]
    )
    raw = path.read_bytes()
    path.unlink()
    if way == "empty":
        path.touch()
    elif way == "cut":
        path.write_bytes(raw[: chance.randrange(len(raw) + 1)])
    elif way == "a folder":
        path.mkdir()
    elif way == "a pipe" and pipes:
        os.mkfifo(path)
    elif way == "a link nowhere":
        path.symlink_to("nowhere")
    elif way == "a link to itself":
        path.symlink_to(path.name)
    elif way == "zeros":
        path.write_bytes(bytes(len(raw)))
    return way


def _header(chance: random.Random, raw: bytes) -> bytes:
    """A safetensors file whose header says something else than its bytes hold."""
    (size,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    way = chance.randrange(7)
    if way == 0:
        return struct.pack("<Q", chance.choice([0, 1, size - 1, size + 1, 10**8, 2**63, 2**64 - 1])) + raw[8:]
    if way == 1:
        return raw[: chance.randrange(len(raw))]
    if way == 2:
        return raw + chance.randbytes(chance.choice([1, 8, 100]))
    name = chance.choice([name for name in header if name != "__metadata__"])
    if way == 3:
        header[chance.choice(["x", "../x", name + ".x", name.replace("0", "7"), ""])] = header.pop(name)
    elif way == 4:
        header[name][chance.choice(["dtype", "shape", "data_offsets"])] = _odd(chance, header[name])
    elif way == 5:
        header = mutate_value(chance, header)
    else:
        start = chance.randrange(len(body))
        body = body[:start] + mutate_bytes(chance, body[start : start + 64]) + body[start + 64 :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _odd(chance: random.Random, tensor: dict[str, Any]) -> Any:
    return chance.choice(
        [
            *("F64", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "X", [], [-1], [0], [2**62, 2**62], [10**12]),
            tensor["shape"][::-1],
            [*tensor["shape"], 1],
            [0, 10**15],
            [5, 2],
            bad_value(chance),
        ]
    )
