"""Reading and writing safetensors files one tensor at a time, or some rows of one.

The library's own functions map a whole file into memory, or hold all of its tensors; merging needs neither.
"""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lorakit.errors import LorakitError, UserError
from lorakit.model.base_files import StoredTensor

CONVERTED_AT_ONCE = 1 << 20  # numbers converted to another type at a time: they stay in the processor's cache
_COPIED_AT_ONCE = 1 << 24

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
TYPES |= {"U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
WORDS = {dtype: word for word, dtype in TYPES.items()}


def read_tensor(stored: StoredTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor on the CPU, as it is stored or in `dtype`, never in both at once; UserError if it cannot be read."""
    if stored.dtype not in TYPES:
        raise UserError(f"{stored.file}: holds numbers of the type {stored.dtype}, which cannot be read.")
    stored_dtype = TYPES[stored.dtype]
    tensor = torch.empty(stored.shape, dtype=dtype or stored_dtype)
    flat = tensor.view(-1)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        if tensor.dtype == stored_dtype:
            _fill(file, flat)
            return tensor
        buffer = torch.empty(min(CONVERTED_AT_ONCE, len(flat)), dtype=stored_dtype)
        for part in flat.split(CONVERTED_AT_ONCE):
            part.copy_(_fill(file, buffer[: len(part)]))
    return tensor


def pieces(stored: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor of ordinary numbers in float32, some rows at a time, each with the number of its first row. A piece may
    be changed, and is valid until the next one is taken: all use the same memory."""
    rows = stored.shape[0]
    at_once = min(rows, max(1, CONVERTED_AT_ONCE // prod(stored.shape[1:])))
    raw = torch.empty((at_once, *stored.shape[1:]), dtype=TYPES[stored.dtype])
    converted = torch.empty(raw.shape, dtype=torch.float32)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        for begin in range(0, rows, at_once):
            count = min(at_once, rows - begin)
            _fill(file, raw[:count].view(-1))
            yield begin, converted[:count].copy_(raw[:count])


def _fill(file: BinaryIO, flat: torch.Tensor) -> torch.Tensor:
    buffer = memoryview(flat.view(torch.uint8).numpy()) if len(flat) else memoryview(b"")
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{file.name}: this weights file ends too early. Fetch it again.")
        buffer = buffer[count:]
    return flat


@dataclass(frozen=True)
class SafetensorsWriter:
    """An open weights file whose tensors are written one by one, in any order."""

    file: int
    places: dict[str, StoredTensor]
    missing: dict[str, int]  # the bytes of each tensor that are not written yet

    def put(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Write a tensor, or rows of one from `row` on, in the type announced; LorakitError where it is not finite."""
        place = self.places[name]
        rows = place.shape[0] if place.shape else 1
        if tuple(tensor.shape[1:]) != place.shape[1:] or row + (len(tensor) if place.shape else 1) > rows:
            raise ValueError(f"{name} is {tuple(tensor.shape)} from {row} on, announced as {place.shape}")
        begin = place.begin + row * (place.size // rows if rows else 0)
        for part in tensor.detach().contiguous().view(-1).split(CONVERTED_AT_ONCE):
            rounded = part.to(TYPES[place.dtype])
            # The sum tells several times faster whether all numbers are finite, unless it is too large itself.
            if place.is_plain and not (rounded.sum(dtype=torch.float32).isfinite() or rounded.isfinite().all()):
                remedy = " Write --dtype bfloat16, which reaches further." if place.dtype == "F16" else ""
                dtype = str(rounded.dtype).removeprefix("torch.")
                raise LorakitError(f"{name}: holds numbers that are not finite in {dtype}.{remedy}")
            _write(self.file, rounded.view(torch.uint8).numpy(), begin)
            begin += rounded.nbytes
            self.missing[name] -= rounded.nbytes

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Copy a tensor from another file, without holding it in memory."""
        begin, buffer = self.places[name].begin, torch.empty(min(_COPIED_AT_ONCE, stored.size), dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as source:
            source.seek(stored.begin)
            for done in range(0, stored.size, _COPIED_AT_ONCE):
                _write(self.file, _fill(source, buffer[: stored.size - done]).numpy(), begin + done)
        self.missing[name] -= stored.size


@contextmanager
def open_writer(path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> Iterator[SafetensorsWriter]:
    """A new weights file for tensors of the given names, types and shapes, all of which have to be written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    places = {
        name: replace(tensor, file=path, begin=len(start) + header[name]["data_offsets"][0])
        for name, tensor in tensors.items()
    }
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):  # finds a full disk before the work is done
            os.posix_fallocate(file, 0, len(start) + end)
        _write(file, start, 0)
        writer = SafetensorsWriter(file, places, {name: tensor.size for name, tensor in tensors.items()})
        yield writer
        if wrong := [name for name, size in writer.missing.items() if size]:
            raise ValueError(f"not written as announced: {wrong[:3]}")
    finally:
        os.close(file)


def _write(file: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
