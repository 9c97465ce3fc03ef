"""The weights files of a model folder, and what their headers say of the tensors in them; without torch.

The format is a length of 8 bytes, a JSON header with each tensor's type, shape and offsets, and the bytes one after
another (safetensors, README, "Format").
"""

import json
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from lorakit.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the library's own limit
_AGAIN = "Fetch the model again."
_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Bytes of one number of the types that are read."""


@dataclass(frozen=True)
class StoredTensor:
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

    def as_type(self, dtype: str) -> "StoredTensor":
        """The same tensor in another type; where it will lie is not yet known."""
        return replace(self, dtype=dtype, size=prod(self.shape) * _BYTES[dtype])


def weight_files(folder: Path, complete: bool = True) -> list[Path]:
    """The weights files that transformers loads from a folder: one, or the shards that the index names.

    Args:
        complete: whether a missing file is a fault; else those are given that are there.

    Raises:
        UserError: there are none, one is missing, or the index names one that lies elsewhere. A file may be a link:
            what it holds is known by its sha256.
    """
    index, single = folder / INDEX, folder / SINGLE
    if complete and not (index.is_file() or single.is_file()):
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        remedy = f" It has {others}: fetch the index of these too, or give a single file that name." if others else ""
        raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}, so it is not a model folder.{remedy}")
    # An index may stand beside a single file, which transformers takes then; other programs may go by the index.
    shards = _shards(index, folder, complete, used=not single.is_file()) if index.is_file() else []
    return [single] if single.is_file() else shards


def _shards(index: Path, folder: Path, complete: bool, used: bool) -> list[Path]:
    """The files that an index names; of one that transformers does not use they need not be there."""
    read = _read_index(index)
    files = []
    for name in sorted(set(read["weight_map"].values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: names {name[:200]!r}, which is no .safetensors file of the folder itself. {_AGAIN}"
            )
        if (folder / name).is_file():
            files.append(folder / name)
        elif complete and used:
            raise UserError(f"{folder}: lacks {name}, which its index names. Fetch it.")
    if used and not isinstance(read.get("metadata"), dict):
        raise UserError(f"{index}: damaged: it has no metadata, which transformers looks for. {_AGAIN}")
    return files


def _read_index(index: Path) -> dict[str, Any]:
    """An index, whose weight_map maps texts to texts."""
    try:
        read = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{index}: damaged: {error}. {_AGAIN}") from error
    named = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: damaged: it has no weight_map that names files. {_AGAIN}")
    odd = [file for file in named.values() if not isinstance(file, str)]
    if odd:
        raise UserError(f"{index}: damaged: its weight_map names {str(odd[0])[:200]} as a file. {_AGAIN}")
    return dict(read)


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the weights that transformers loads from a folder, by name, in the order of the files.

    Raises:
        UserError: a file is missing or damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        found |= read_header(file)[0]
    return found


def read_metadata(file: Path) -> dict[str, str]:
    """What a file says of itself besides its tensors."""
    return read_header(file)[1]


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a weights file in the order of their bytes, and what it says of itself besides.

    Raises:
        UserError: it is damaged.
    """
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
            name: StoredTensor(file, facts["dtype"], tuple(facts["shape"]), 8 + length + begin, end - begin)
            for name, facts in header.items()
            for begin, end in [facts["data_offsets"]]
        }
        in_order = sorted(found.items(), key=lambda item: (item[1].begin, item[1].size))
        fits = _fits([tensor for _, tensor in in_order], 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if not fits:
        raise damaged
    return dict(in_order), metadata


def _fits(tensors: list[StoredTensor], start: int, size: int) -> bool:
    """Whether tensors, in order, fill a file from `start` to its end, each with the bytes that its shape takes."""
    ends = [tensor.begin + tensor.size for tensor in tensors]
    shaped = all(isinstance(side, int) and side >= 0 for tensor in tensors for side in tensor.shape)
    whole = [tensor.begin for tensor in tensors] == [start, *ends[:-1]] if tensors else True
    sized = all(one.size == prod(one.shape) * _BYTES[one.dtype] for one in tensors if one.dtype in _BYTES)
    return shaped and whole and sized and (not ends or ends[-1] == size)
