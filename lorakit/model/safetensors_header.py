"""The weights files of a model folder, and what their headers say of the tensors in them; without torch."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.model.config_values import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the library's own limit
_REMEDY = "Fetch the model again."


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    file: Path
    dtype: str  # the format's word, such as BF16
    shape: tuple[int, ...]
    begin: int  # offset of its bytes in the file

    @property
    def size(self) -> int:
        """Its bytes."""
        bits = re.search(r"\d+", self.dtype)  # BOOL takes a byte
        return prod(self.shape) * (int(bits[0]) if bits else 8) // 8

    @property
    def is_plain(self) -> bool:
        """Whether it holds ordinary floating-point numbers, which a merge may round to another type."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


def weight_files(folder: Path, complete: bool = True) -> list[Path]:
    """The weights files that transformers loads from a folder: one, or the shards that the index names.

    A file may be a link, since its content is known by its sha256. Unless `complete`, missing files are left out, else
    they are a UserError, as is an index that is damaged or names a file of another folder.
    """
    index, single = folder / INDEX, folder / SINGLE
    if complete and not (index.is_file() or single.is_file()):
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        remedy = f" It has {others}: fetch the index of these too, or give a single file that name." if others else ""
        raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}, so it is not a model folder.{remedy}")
    # transformers ignores an index beside a single file, but other programs may go by it: it is checked all the same.
    content = _read_index(index) if index.is_file() else {"weight_map": {}}
    if single.is_file():
        return [single]
    shards = [folder / name for name in sorted(set(content["weight_map"].values()))]
    missing = [file for file in shards if not file.is_file()]
    if missing and complete:
        raise UserError(f"{folder}: lacks {missing[0].name}, which its index names. Fetch it.")
    if shards and not isinstance(content.get("metadata"), dict):
        raise UserError(f"{index}: damaged: it has no metadata, which transformers looks for. {_REMEDY}")
    return [file for file in shards if file not in missing]


def _read_index(index: Path) -> dict[str, Any]:
    """The content of an index, whose weight_map names files of its folder."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: damaged: it has no weight_map that names files. {_REMEDY}")
    for name in weight_map.values():
        if not (isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")):
            shown = repr(name)[:200]
            raise UserError(f"{index}: names {shown}, which is not a .safetensors file of its folder. {_REMEDY}")
    return content


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the weights that transformers loads from a folder, by name, in the order of the files."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file)[0].items()}


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a weights file in the order of their bytes, and its metadata; UserError where it is damaged.

    The format: the header's length in 8 bytes, the header as JSON, the tensors without a gap.
    """
    damaged = UserError(f"{file}: this weights file is damaged: its header does not fit its bytes. Fetch it again.")
    file_size, tensors = file.stat().st_size, {}
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(file_size - 8, _LARGEST_HEADER):
            raise damaged
        text = opened.read(length)
    start = end = 8 + length
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            tensors[name] = tensor = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + begin)
            has_shape = all(isinstance(side, int) and side >= 0 for side in tensor.shape)
            if not has_shape or tensor.begin != end or tensor.size != stop - begin:
                raise damaged
            end += tensor.size
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if end != file_size:
        raise damaged
    return tensors, metadata
