"""The files of a model folder: whether they can be trained on (complete, undamaged, nothing of them run or unpickled),
which of them are its weights, and what their headers say of the tensors. Without torch, for `lorakit check` too.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakit.atomic_io import lies_inside, refuse_pipes
from lorakit.errors import BaseModelError, UserError
from lorakit.model.config_values import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the library's own limit
_REMEDY = "Fetch the model again."
_KERNELS = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Ends of files that are copied into results; weights are not, and may be links.
_COPIED = (".json", ".jinja", ".model", ".tiktoken", "vocab.txt", "merges.txt")
# A model with a tokenizer has at least one of these.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


def check_base_files(folder: Path, complete: bool = True) -> None:
    """Refuse a folder that transformers cannot load, or not without running code or unpickling anything. `complete`:
    whether a missing file is an error. In the hub's cache it is not, where a run fetches it."""
    try:
        refuse_pipes(folder)
        refuse_code(folder)
        for path in sorted(folder.iterdir()):
            if path.name.endswith(_COPIED) and path.is_symlink() and not lies_inside(path, folder):
                reason = f"{path} is a link to {path.resolve()}, outside of the folder"
                remedy = "Put the file itself there (cp -L): it is copied into adapters and merged models."
                raise UserError(f"{reason}. {remedy}")
        _check_configs(folder, complete)
        if any(folder.glob("*.safetensors")):
            for file in weight_files(folder, complete):
                read_header(file)
        else:
            pickled = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED))
            remedy = f" It has {pickled}, which would run code when read: convert it to safetensors." if pickled else ""
            if pickled or complete:
                raise UserError(f"{folder} has no .safetensors file.{remedy}")
        _check_tokenizer(folder / "tokenizer.json")
    except UserError as error:
        raise BaseModelError(str(error)) from error


def refuse_code(folder: Path, where: str = "") -> None:
    """Refuse a folder whose configuration names Python code to run, its own or a kernel of the hub, in whichever file.
    `where` begins the message, such as a key of the recipe."""
    for file in sorted(folder.glob("*config.json")):
        try:
            config = read_json(file)
        except UserError:
            continue  # transformers cannot read it either; what a run reads is checked apart
        for key, names in _code_in(config):
            reason = f"brings its own Python code ({names}, in {key} of {file.name}), which lorakit does not run"
            remedy = f"Give a model without, or, where transformers has a class for it, a copy without {key}."
            raise UserError(f"{where}{folder} {reason}. {remedy}")


def _code_in(value: Any) -> Iterator[tuple[str, str]]:
    """Each key that names code, at any depth, and the names. `auto_map` maps classes to code, or lists it.
    An attention or expert implementation named as a hub repository is code that transformers fetches and runs."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                yield "auto_map", ", ".join(_texts_in(value["auto_map"])) or "an empty name"
            for key in value.keys() & _KERNELS:
                if kernels := [text for text in _texts_in(value[key]) if "/" in text]:
                    yield key, ", ".join(kernels)
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts_in(part)]
    return [str(value)[:80]] if value else []


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has some file that a tokenizer is read from."""
    return any(next(folder.glob(name), None) for name in _TOKENIZERS)


def _check_configs(folder: Path, complete: bool) -> None:
    file, has_adapter = folder / "config.json", (folder / "adapter_config.json").is_file()
    if not file.is_file():
        if has_adapter:
            raise UserError(
                f"{folder} is an adapter, not a model. Give its base; a recipe names the adapter in adapter.from."
            )
        if complete:
            if (folder / "manifest.json").is_file():
                remedy = "Give the merged/ in it; a recipe names the run in adapter.from."
                raise UserError(f"{folder} is a run, not a model: it has no config.json. {remedy}")
            raise UserError(f"{folder} has no config.json, so it is not a model folder.")
        return
    config = read_json(file)
    for path in (file, folder / "tokenizer_config.json", folder / "generation_config.json"):
        if read_json(path).get("auto_map", {}) is None:
            raise UserError(f"{path} says auto_map: null, on which transformers fails. Remove the key.")
    if "model_type" not in config:
        raise UserError(f"{file} names no model_type.")
    other = config.get("transformers_weights")
    if other not in (None, SINGLE, INDEX):
        reason = f"names other weights than {SINGLE} (transformers_weights: {other!r})"
        raise UserError(f"{file} {reason}, which lorakit does not look for. Rename the file, and remove the key.")
    if has_adapter:
        reason = "has adapter_config.json: transformers would put that adapter into the model"
        raise UserError(f"{folder} {reason}. Merge it into the model first, or give a folder without it.")


def _check_tokenizer(path: Path) -> None:
    """Whether tokenizer.json begins and ends as a mapping does; reading all of it takes too long here."""
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(4096).strip()
            file.seek(max(0, path.stat().st_size - 4096))
            end = file.read().strip()
        if not (begin.startswith(b"{") and end.endswith(b"}")):
            raise UserError(f"{path} is damaged: it is not a complete JSON mapping. Fetch the model again.")


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
    """The weights files that transformers loads from a folder: one, or the shards that the index names. A file may be a
    link, since its content is known by its sha256. Unless `complete`, missing files are left out, else they are a
    UserError, as is an index that is damaged or names a file of another folder."""
    index, single = folder / INDEX, folder / SINGLE
    if complete and not (index.is_file() or single.is_file()):
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        remedy = f" It has {others}: fetch the index of these too, or give a single file that name." if others else ""
        raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}, so it is not a model folder.{remedy}")
    # transformers ignores an index beside a single file, but other programs may go by it: it is checked all the same.
    content = read_json(index) if index.is_file() else {"weight_map": {}}
    names = content.get("weight_map")
    if not isinstance(names, dict) or (index.is_file() and not names):
        raise UserError(f"{index}: damaged: it has no weight_map that names files. {_REMEDY}")
    for name in names.values():
        if not (isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")):
            reason = f"weight_map names {repr(name)[:200]}, which is not a .safetensors file of its folder"
            raise UserError(f"{index}: damaged: its {reason}. {_REMEDY}")
    if single.is_file():
        return [single]
    shards = [folder / name for name in sorted(set(names.values()))]
    missing = [file for file in shards if not file.is_file()]
    if missing and complete:
        raise UserError(f"{folder}: lacks {missing[0].name}, which its index names. Fetch it.")
    if shards and not isinstance(content.get("metadata"), dict):
        raise UserError(f"{index}: damaged: it has no metadata, which transformers looks for. {_REMEDY}")
    return [file for file in shards if file not in missing]


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the weights that transformers loads from a folder, by name, in the order of the files."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file)[0].items()}


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a weights file in the order of their bytes, and its metadata; UserError where it is damaged. The
    format: the header's length in 8 bytes, the header as JSON, the tensors without a gap."""
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
