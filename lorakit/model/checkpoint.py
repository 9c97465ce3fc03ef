"""The safetensors files of a model folder, read and written one tensor at a time.

The library's own functions map a whole file into memory, or hold all of its tensors; merging needs neither. The format
is a length of 8 bytes, a JSON header with each tensor's type, shape and offsets, and the bytes one after another
(safetensors, README, "Format").
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

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the library's own limit
_COPIED_AT_ONCE = 1 << 24
_CONVERTED_AT_ONCE = 1 << 20  # numbers, which then stay in the processor's cache

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
        piece = torch.empty(min(_CONVERTED_AT_ONCE, len(flat)), dtype=there)
        for begin in range(0, len(flat), _CONVERTED_AT_ONCE):
            some = piece[: len(flat) - begin]
            _fill(opened, some, stored)
            flat[begin : begin + len(some)].copy_(some)
    return tensor


def pieces(stored: OnDisk) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor of ordinary numbers in float32, some rows at a time, each with the number of its first row.

    A piece is good until the next one is asked for, and may be changed: all lie in the same memory.
    """
    rows, width = stored.shape[0], prod(stored.shape[1:])
    at_once = min(rows, max(1, _CONVERTED_AT_ONCE // width))
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


class Writing:
    """A weights file whose tensors are put in place one by one, in any order."""

    def __init__(self, path: Path, tensors: dict[str, OnDisk], metadata: dict[str, str]) -> None:
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
            name: OnDisk(path, facts["dtype"], tuple(facts["shape"]), 8 + len(text) + facts["data_offsets"][0], size)
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
        for some in tensor.detach().contiguous().view(-1).split(_CONVERTED_AT_ONCE):
            narrow = some.to(TYPES[place.dtype])
            if place.is_plain and not _is_finite(narrow):
                remedy = " Write --dtype bfloat16, which reaches further." if place.dtype == "F16" else ""
                raise LorakitError(
                    f"{name}: holds numbers that are not finite in {str(narrow.dtype).removeprefix('torch.')}.{remedy}"
                )
            self._write(memoryview(narrow.view(torch.uint8).numpy()), begin)
            begin += narrow.nbytes
            self._missing[name] -= narrow.nbytes

    def copy(self, name: str, stored: OnDisk) -> None:
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
def writing(path: Path, tensors: dict[str, OnDisk], metadata: dict[str, str]) -> Iterator[Writing]:
    """A weights file to put `tensors` into, all of which have to be written."""
    file = Writing(path, tensors, metadata)
    try:
        file.reserve()
        yield file
        file.check_whole()
    finally:
        file.close()


def _is_finite(tensor: torch.Tensor) -> bool:
    """A sum is finite only where each number is, and is told several times faster; a sum alone may be too large."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
