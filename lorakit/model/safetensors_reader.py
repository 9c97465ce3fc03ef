"""Reading safetensors files one tensor at a time.

The library's own functions map a whole file into memory, or hold all of its tensors; merging needs neither.
"""

from collections.abc import Iterator
from math import prod
from typing import BinaryIO

import torch

from lorakit.errors import UserError
from lorakit.model.safetensors_header import StoredTensor

CONVERTED_AT_ONCE = 1 << 20
"""Numbers converted to another type at a time: they stay in the processor's cache."""

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
    """One tensor on the CPU, as it is stored or in `dtype`, and never in both at once.

    Raises:
        UserError: torch does not have its type, or the file ends too early.
    """
    if stored.dtype not in TYPES:
        raise UserError(f"{stored.file}: holds numbers of the type {stored.dtype}, which cannot be read.")
    stored_dtype = TYPES[stored.dtype]
    tensor = torch.empty(stored.shape, dtype=dtype or stored_dtype)
    flat = tensor.view(-1)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        if tensor.dtype == stored_dtype:
            fill(file, flat)
            return tensor
        buffer = torch.empty(min(CONVERTED_AT_ONCE, len(flat)), dtype=stored_dtype)
        for part in flat.split(CONVERTED_AT_ONCE):
            part.copy_(fill(file, buffer[: len(part)]))
    return tensor


def pieces(stored: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor of ordinary numbers in float32, some rows at a time, each with the number of its first row.

    A piece may be changed, and is valid until the next one is taken: all use the same memory.
    """
    rows = stored.shape[0]
    at_once = min(rows, max(1, CONVERTED_AT_ONCE // prod(stored.shape[1:])))
    raw = torch.empty((at_once, *stored.shape[1:]), dtype=TYPES[stored.dtype])
    converted = torch.empty(raw.shape, dtype=torch.float32)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        for begin in range(0, rows, at_once):
            count = min(at_once, rows - begin)
            fill(file, raw[:count].view(-1))
            yield begin, converted[:count].copy_(raw[:count])


def fill(file: BinaryIO, flat: torch.Tensor) -> torch.Tensor:
    """Read the next bytes of a file into a tensor of one dimension, and return it."""
    buffer = memoryview(flat.view(torch.uint8).numpy()) if len(flat) else memoryview(b"")
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{file.name}: this weights file ends too early. Fetch it again.")
        buffer = buffer[count:]
    return flat
