"""Writing a safetensors file one tensor at a time, or some rows of one, in any order."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import LorakitError
from lorakit.model.safetensors_header import StoredTensor
from lorakit.model.safetensors_reader import CONVERTED_AT_ONCE, TYPES, fill

_COPIED_AT_ONCE = 1 << 24


@contextmanager
def open_writer(
    path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]
) -> Iterator["SafetensorsWriter"]:
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
        writer = SafetensorsWriter(file, places, {name: tensor.size for name, tensor in tensors.items()})
        writer._write(start, 0)
        yield writer
        wrong = [name for name, size in writer.missing.items() if size]
        if wrong:
            raise ValueError(f"not written as announced: {wrong[:3]}")
    finally:
        os.close(file)


@dataclass(frozen=True)
class SafetensorsWriter:
    """An open weights file whose tensors are written one by one, in any order."""

    file: int
    places: dict[str, StoredTensor]
    missing: dict[str, int]
    """The bytes of each tensor that are not written yet."""

    def put(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Write a tensor, or rows of one from `row` on, rounded to the type that was announced.

        Raises:
            LorakitError: a number is not finite in that type.
        """
        place = self.places[name]
        rows = place.shape[0] if place.shape else 1
        if tuple(tensor.shape[1:]) != place.shape[1:] or row + (len(tensor) if place.shape else 1) > rows:
            raise ValueError(f"{name} is {tuple(tensor.shape)} from {row} on, announced as {place.shape}")
        begin = place.begin + row * (place.size // rows if rows else 0)
        for part in tensor.detach().contiguous().view(-1).split(CONVERTED_AT_ONCE):
            rounded = part.to(TYPES[place.dtype])
            if place.is_plain and not _is_finite(rounded):
                remedy = " Write --dtype bfloat16, which reaches further." if place.dtype == "F16" else ""
                dtype = str(rounded.dtype).removeprefix("torch.")
                raise LorakitError(f"{name}: holds numbers that are not finite in {dtype}.{remedy}")
            self._write(memoryview(rounded.view(torch.uint8).numpy()), begin)
            begin += rounded.nbytes
            self.missing[name] -= rounded.nbytes

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Copy a tensor from another file, without holding it in memory."""
        begin, buffer = self.places[name].begin, torch.empty(min(_COPIED_AT_ONCE, stored.size), dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as source:
            source.seek(stored.begin)
            for done in range(0, stored.size, _COPIED_AT_ONCE):
                part = fill(source, buffer[: stored.size - done])
                self._write(memoryview(part.numpy()), begin + done)
        self.missing[name] -= stored.size

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.file, view, offset)
            view, offset = view[count:], offset + count


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite. Their sum tells it several times faster, unless it is too large itself."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
