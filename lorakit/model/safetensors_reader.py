"""The safetensors files of a model folder, read one tensor at a time.

The library's own functions map a whole file into memory, or hold all of its tensors; merging needs neither. What a file
holds is read in `weight_files.py`.
"""

from collections.abc import Iterator
from math import prod
from typing import BinaryIO

import torch

from lorakit.errors import UserError
from lorakit.model.safetensors_header import StoredTensor

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
WORDS = {dtype: word for word, dtype in TYPES.items()}


def read_tensor(stored: StoredTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
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


def pieces(stored: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
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


def _fill(opened: BinaryIO, flat: torch.Tensor, stored: StoredTensor) -> None:
    """Read the next bytes of a file into a tensor of one dimension."""
    if not len(flat):
        return
    buffer, done = memoryview(flat.view(torch.uint8).numpy()), 0
    while done < len(buffer):
        count = opened.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{stored.file}: this weights file ends too early. Fetch it again.")
        done += count
