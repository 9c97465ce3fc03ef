"""The safetensors files of a model folder, read one tensor at a time.

The library's own functions map a whole file into memory, or hold all of its tensors; merging needs neither. The format
is a length of 8 bytes, a JSON header with each tensor's type, shape and offsets, and the bytes one after another
(safetensors, README, "Format").
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from lorakit.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the library's own limit
CONVERTED_AT_ONCE = 1 << 20
"""Numbers brought to another type at a time: they stay in the processor's cache."""

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_WORDS = {dtype: word for word, dtype in TYPES.items()}


@dataclass(frozen=True)
class OnDisk:
    """One tensor in a file."""

    file: Path
    dtype: str
    """The format's word for its type, such as BF16."""
    shape: tuple[int, ...]
    begin: int
    """Where its bytes begin, counted from the beginning of the file."""
    size: int
    """Its bytes."""

    @property
    def is_plain(self) -> bool:
        """Whether it holds ordinary floating-point numbers, which a merge may round to another type."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    def as_type(self, dtype: torch.dtype) -> "OnDisk":
        """The same tensor in another type; where it will lie is not yet known."""
        return replace(self, dtype=_WORDS[dtype], size=prod(self.shape) * dtype.itemsize)


def tensors_of(folder: Path) -> dict[str, OnDisk]:
    """Every tensor of the weights that transformers loads from a folder, by name, in the order of the files.

    Raises:
        UserError: a file is missing or damaged.
    """
    found: dict[str, OnDisk] = {}
    for file in weight_files(folder):
        found |= _header(file)[0]
    return found


def weight_files(folder: Path) -> list[Path]:
    """The weights files that transformers loads from a folder: one, or the shards that the index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    except FileNotFoundError as error:
        raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}, so it is no model folder.") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: damaged: {error}. Fetch the model again.") from error
    for file in files:
        if file.parent != folder:  # only the folder's own files are known by their sha256
            raise UserError(f"{index}: names {file}, which does not lie in the folder itself.")
        if not file.is_file():
            raise UserError(f"{folder}: lacks {file.name}, which its index names. Fetch it.")
    return files


def metadata_of(file: Path) -> dict[str, str]:
    """What a file says of itself besides its tensors."""
    return _header(file)[1]


def _header(file: Path) -> tuple[dict[str, OnDisk], dict[str, str]]:
    damaged = UserError(f"{file}: this weights file is damaged: its header does not fit its bytes. Fetch it again.")
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(size - 8, _LARGEST_HEADER):
            raise damaged
        text = opened.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        found = {
            name: OnDisk(file, facts["dtype"], tuple(facts["shape"]), 8 + length + begin, end - begin)
            for name, facts in header.items()
            for begin, end in [facts["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    in_order = sorted(found.items(), key=lambda item: (item[1].begin, item[1].size))
    ends = [tensor.begin + tensor.size for _, tensor in in_order]
    begins = [tensor.begin for _, tensor in in_order]
    shaped = all(isinstance(side, int) and side >= 0 for tensor in found.values() for side in tensor.shape)
    whole = begins == [8 + length, *ends[:-1]] if begins else True
    sized = all(t.size == prod(t.shape) * TYPES[t.dtype].itemsize for t in found.values() if t.dtype in TYPES)
    if not (shaped and whole and sized and (not ends or ends[-1] == size)):
        raise damaged
    return dict(in_order), metadata


def read_tensor(stored: OnDisk, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor in memory of its own, on the CPU, as it lies there or in `dtype`, and never in both.

    Raises:
        UserError: it is of a type that torch has not, or the file ends before it.
    """
    if stored.dtype not in TYPES:
        raise UserError(f"{stored.file}: holds numbers of the type {stored.dtype}, which cannot be read.")
    there = TYPES[stored.dtype]
    tensor = torch.empty(stored.shape, dtype=dtype or there)
    flat = tensor.view(-1)
    with stored.file.open("rb", buffering=0) as opened:
        opened.seek(stored.begin)
        if tensor.dtype == there:
            _fill(opened, flat, stored)
            return tensor
        piece = torch.empty(min(CONVERTED_AT_ONCE, len(flat)), dtype=there)
        for begin in range(0, len(flat), CONVERTED_AT_ONCE):
            some = piece[: len(flat) - begin]
            _fill(opened, some, stored)
            flat[begin : begin + len(some)].copy_(some)
    return tensor


def pieces(stored: OnDisk) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor of ordinary numbers in float32, some rows at a time, each with the number of its first row.

    A piece is good until the next one is asked for, and may be changed: all lie in the same memory.
    """
    rows, width = stored.shape[0], prod(stored.shape[1:])
    at_once = min(rows, max(1, CONVERTED_AT_ONCE // width))
    raw = torch.empty((at_once, *stored.shape[1:]), dtype=TYPES[stored.dtype])
    wide = torch.empty(raw.shape, dtype=torch.float32)
    with stored.file.open("rb", buffering=0) as opened:
        opened.seek(stored.begin)
        for begin in range(0, rows, at_once):
            count = min(at_once, rows - begin)
            _fill(opened, raw[:count].view(-1), stored)
            yield begin, wide[:count].copy_(raw[:count])


def _fill(opened: BinaryIO, flat: torch.Tensor, stored: OnDisk) -> None:
    """Read the next bytes of a file into a tensor of one dimension."""
    if not len(flat):
        return
    buffer, done = memoryview(flat.view(torch.uint8).numpy()), 0
    while done < len(buffer):
        count = opened.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{stored.file}: this weights file ends too early. Fetch it again.")
        done += count
