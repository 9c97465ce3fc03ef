"""Writing a merged model: the base's files over again, tensor by tensor, with the adapter in them."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.amounts import decimal_bytes
from lorakit.errors import LorakitError, explain_error
from lorakit.merge.apply_delta import Folding, WeightDelta
from lorakit.model.quantized_weights import WeightPrecision
from lorakit.model.safetensors_header import INDEX, SINGLE, StoredTensor, read_metadata, weight_files
from lorakit.model.safetensors_reader import TYPES, WORDS, pieces, read_tensor
from lorakit.model.safetensors_writer import SafetensorsWriter, open_writer
from lorakit.model.state_dict import Group, Weights
from lorakit.progress import Progress

_BESIDE = 64 << 20  # what tokenizer, configuration and card may take


def write_weights(
    weights: Weights,
    held: WeightPrecision,
    folding: Folding,
    dtype: torch.dtype | None,
    folder: Path,
    progress: Progress,
) -> list[str]:
    """Write the merged weights under the names, in the shards and in the types of the base; the types, as words.

    Each is read, brought to what `held` says that the adapter stands on, folded in float32 and rounded once, some
    rows at a time, or as a whole where it is quantized or made of several tensors. What nothing changes is copied.
    `dtype` rounds all of them to one type instead.

    Raises:
        LorakitError: the disk has too little room, or a merged weight is not finite.
    """
    unused = set(weights.unused)  # which may hold anything, such as masks of -inf
    planned = {
        name: tensor if dtype is None or not tensor.is_plain or name in unused else tensor.as_type(WORDS[dtype])
        for name, tensor in weights.tensors.items()
    }
    check_space(folder, sum(tensor.size for tensor in planned.values()))
    every = sum(tensor.size for tensor in weights.tensors.values())
    with ExitStack() as opened:
        files = {
            file: opened.enter_context(open_writer(folder / file.name, _of(file, planned), read_metadata(file)))
            for file in weight_files(weights.folder)
        }
        work = _Work(weights, held, with_tied(weights, folding.folds), files, planned)
        bar = opened.enter_context(progress.bar("merging", total=every, unit="bytes"))
        for group in _in_order_of_files(weights):
            work.write(group)
            bar.advance(sum(weights.tensors[name].size for name in group.names))
    _write_index(weights, planned, folder)
    return sorted({planned[name].dtype for group in weights.groups for name in group.names if planned[name].is_plain})


@dataclass(frozen=True)
class _Work:
    """What is to be written, and into which files."""

    weights: Weights
    held: WeightPrecision
    folds: dict[str, WeightDelta]
    files: dict[Path, SafetensorsWriter]
    planned: dict[str, StoredTensor]

    def write(self, group: Group) -> None:
        """Write the tensors of one group: copied, changed some rows at a time, or changed as a whole."""
        stored = [self.weights.tensors[name] for name in group.names]
        types = [TYPES.get(tensor.dtype, torch.uint8) for tensor in stored]
        if not any(path in self.folds or any(self.held.rounds(path, one) for one in types) for path in group.paths):
            for name, tensor in zip(group.names, stored, strict=True):
                self._take_over(name, tensor)
        elif group.converter is None and self._by_rows(group.paths[0], stored[0]):
            (name,), (path,) = group.names, group.paths
            for row, piece in pieces(stored[0]):
                held = self.held(path, piece)
                self._put(name, self.folds[path](held, row) if path in self.folds else held, row)
        else:
            values = {path: self.held(path, value) for path, value in self.weights.read_group(group).items()}
            for path in values.keys() & self.folds.keys():
                values[path] = self.folds[path](values[path])
            for name, value in self.weights.names_in_files(group, values).items():
                self._put(name, value)

    def _by_rows(self, path: str, stored: StoredTensor) -> bool:
        can = path not in self.folds or self.folds[path].by_rows
        return can and path not in self.held.turned and stored.is_plain and bool(stored.shape) and stored.size > 0

    def _take_over(self, name: str, stored: StoredTensor) -> None:
        if self.planned[name].dtype == stored.dtype:
            self.files[stored.file].copy(name, stored)
        else:
            self._put(name, read_tensor(stored))

    def _put(self, name: str, value: torch.Tensor, row: int = 0) -> None:
        self.files[self.planned[name].file].put(name, value, row)


def _of(file: Path, planned: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in planned.items() if tensor.file == file}


def _in_order_of_files(weights: Weights) -> list[Group]:
    order = {name: number for number, name in enumerate(weights.tensors)}
    every = [*weights.groups, *(Group((name,), ()) for name in weights.unused)]
    return sorted(every, key=lambda group: min(order[name] for name in group.names))


def with_tied(weights: Weights, folds: dict[str, WeightDelta]) -> dict[str, WeightDelta]:
    """What is done to a weight is done under each name that a file may have for it."""
    other = {also: fold for path, fold in folds.items() for also in weights.tied_to(path)}
    return other | folds


def _write_index(weights: Weights, planned: dict[str, StoredTensor], folder: Path) -> None:
    if {tensor.file.name for tensor in planned.values()} == {SINGLE}:
        return
    named = weights.folder / INDEX
    index = json.loads(named.read_text(encoding="utf-8")) if named.is_file() else {}
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(t.size for t in planned.values())}
    index["weight_map"] = {name: tensor.file.name for name, tensor in planned.items()}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_space(folder: Path, size: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        LorakitError: it has less than `size` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < size + _BESIDE:
        raise LorakitError(
            f"{folder.parent}: the merged model takes {decimal_bytes(size)}, and {decimal_bytes(free)} are free there. "
            "Make room, or write --output with a folder on another disk."
        )


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Say what became of `output` where the system refuses something while it is made, as a full disk does."""
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:
        told = explain_error(error)
        if told is None:
            raise
        raise type(told)(f"{output}: was not written, and nothing of it was kept: {told}") from error
