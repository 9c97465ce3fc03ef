"""Writing a safetensors file one tensor at a time, or some rows of one, in any order."""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import LorakitError, UserError
from lorakit.model.safetensors_header import StoredTensor
from lorakit.model.safetensors_reader import CONVERTED_AT_ONCE, TYPES

_COPIED_AT_ONCE = 1 << 24


class SafetensorsWriter:
    """A weights file whose tensors are put in place one by one, in any order."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> None:
        """Of the `tensors` types and shapes count. The file is empty until it is reserved."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        begin = 0
        for name, tensor in tensors.items():
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, begin + tensor.size]}
            begin += tensor.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._missing = {name: tensor.size for name, tensor in tensors.items()}
        self._places = {
            name: StoredTensor(
                path, facts["dtype"], tuple(facts["shape"]), 8 + len(text) + facts["data_offsets"][0], size
            )
            for name, facts in header.items()
            if name != "__metadata__"
            for size in [facts["data_offsets"][1] - facts["data_offsets"][0]]
        }
        self._head, self._size = struct.pack("<Q", len(text)) + text, 8 + len(text) + begin
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def reserve(self) -> None:
        """Take the file's whole size from the disk, and write its header."""
        if hasattr(os, "posix_fallocate"):  # a full disk is found before the work, where the system can say it
            os.posix_fallocate(self._file, 0, self._size)
        self._write(self._head, 0)

    def put(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Write a tensor, or from `row` on some rows of one, rounded to the type that was announced.

        Raises:
            LorakitError: a number is not finite in that type.
        """
        place = self._places[name]
        rows = place.shape[0] if place.shape else 1
        if tuple(tensor.shape[1:]) != place.shape[1:] or row + (len(tensor) if place.shape else 1) > rows:
            raise ValueError(f"{name} is {tuple(tensor.shape)} from {row} on, announced as {place.shape}")
        begin = place.begin + row * (place.size // rows if rows else 0)
        for some in tensor.detach().contiguous().view(-1).split(CONVERTED_AT_ONCE):
            narrow = some.to(TYPES[place.dtype])
            if place.is_plain and not _is_finite(narrow):
                remedy = " Write --dtype bfloat16, which reaches further." if place.dtype == "F16" else ""
                raise LorakitError(
                    f"{name}: holds numbers that are not finite in {str(narrow.dtype).removeprefix('torch.')}.{remedy}"
                )
            self._write(memoryview(narrow.view(torch.uint8).numpy()), begin)
            begin += narrow.nbytes
            self._missing[name] -= narrow.nbytes

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Take a tensor over from another file, byte by byte, without holding it in memory."""
        place = self._places[name]
        buffer = memoryview(bytearray(min(_COPIED_AT_ONCE, stored.size)))
        done = 0
        with stored.file.open("rb", buffering=0) as source:
            source.seek(stored.begin)
            while done < stored.size:
                count = source.readinto(buffer[: stored.size - done])
                if not count:
                    raise UserError(f"{stored.file}: this weights file ends too early. Fetch it again.")
                self._write(buffer[:count], place.begin + done)
                done += count
        self._missing[name] -= done

    def close(self) -> None:
        os.close(self._file)

    def check_whole(self) -> None:
        """Every announced tensor was written, once."""
        wrong = [name for name, size in self._missing.items() if size]
        if wrong:
            raise ValueError(f"not written as announced: {wrong[:3]}")

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count


@contextmanager
def open_writer(path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> Iterator[SafetensorsWriter]:
    """A weights file to put `tensors` into, all of which have to be written."""
    file = SafetensorsWriter(path, tensors, metadata)
    try:
        file.reserve()
        yield file
        file.check_whole()
    finally:
        file.close()


def _is_finite(tensor: torch.Tensor) -> bool:
    """A sum is finite only where each number is, and is told several times faster; a sum alone may be too large."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
