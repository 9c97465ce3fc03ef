"""Writing a merged model: the base's files once more, tensor by tensor, with the adapter in them."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorakit.amounts import decimal_bytes
from lorakit.errors import LorakitError, UserError, explain_error
from lorakit.merge.apply_delta import Deltas
from lorakit.model.base_files import INDEX, SINGLE, StoredTensor, read_header, weight_files
from lorakit.model.config_values import read_json
from lorakit.model.safetensors_io import WORDS, SafetensorsWriter, open_writer, read_tensor
from lorakit.model.state_dict import Group, WeightPrecision, Weights, untied
from lorakit.progress import Progress

_OTHER_FILES = 64 << 20  # what tokenizer, configuration and card may take


def weights_to_write(weights: Weights, deltas: Deltas) -> Weights:
    """The weights that the merged files hold: those of the base, untied where the adapter changes one end of a tied
    weight, or each end in another way."""
    ties = [(path, other) for path, others in sorted(weights.ties.items()) for other in others]
    if any(not deltas[path].is_same(deltas.get(other)) for path, other in ties if path in deltas):
        weights = untied(weights)
    known = {name for path in weights.group_by_path for name in (path, *weights.ties.get(path, ()))}
    unknown = min(deltas.keys() - known, default=None)
    if unknown:
        raise UserError(f"adapter: changes {unknown}, which the base does not have. A merged model cannot hold it.")
    return weights


def with_tied_names(weights: Weights, deltas: Deltas) -> Deltas:
    """The deltas under each name that a file may have for a tied weight."""
    return {other: delta for path, delta in deltas.items() for other in weights.ties.get(path, ())} | deltas


def write_weights(
    weights: Weights,
    precision: WeightPrecision,
    deltas: Deltas,
    dtype: torch.dtype | None,
    folder: Path,
    progress: Progress,
) -> list[str]:
    """Write the merged weights under the names, in the shards and in the types of the base; return the types, as words.

    Each is read, converted to the `precision` that the adapter is added to, changed in float32 and rounded once, some
    rows at a time, or as a whole where it is quantized or made of several tensors. What nothing changes is copied.
    `dtype` rounds all of them to one type instead.
    """
    unused = set(weights.unused)  # which may hold anything, such as masks of -inf
    planned = {
        name: tensor if dtype is None or not tensor.is_plain or name in unused else replace(tensor, dtype=WORDS[dtype])
        for name, tensor in weights.tensors.items()
    }
    size, free = sum(tensor.size for tensor in planned.values()), shutil.disk_usage(folder).free
    if free < size + _OTHER_FILES:
        raise LorakitError(
            f"{folder.parent}: the merged model takes {decimal_bytes(size)}, and {decimal_bytes(free)} are free there. "
            "Make room, or write --output with a folder on another disk."
        )
    order = {name: number for number, name in enumerate(weights.tensors)}
    groups = [*weights.groups, *(Group((name,), ()) for name in weights.unused)]
    with ExitStack() as opened:
        files = {}
        for file in weight_files(weights.folder):
            tensors = {name: tensor for name, tensor in planned.items() if tensor.file == file}
            files[file] = opened.enter_context(open_writer(folder / file.name, tensors, read_header(file)[1]))
        writer = _GroupWriter(weights, precision, with_tied_names(weights, deltas), files, planned)
        total = sum(tensor.size for tensor in weights.tensors.values())
        bar = opened.enter_context(progress.bar("merging", total=total, unit="bytes"))
        for group in sorted(groups, key=lambda group: min(order[name] for name in group.names)):
            writer.write(group)
            bar.advance(sum(weights.tensors[name].size for name in group.names))
    if {tensor.file.name for tensor in planned.values()} != {SINGLE}:
        index = read_json(weights.folder / INDEX)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
        index["weight_map"] = {name: tensor.file.name for name, tensor in planned.items()}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sorted({planned[name].dtype for group in weights.groups for name in group.names if planned[name].is_plain})


@dataclass(frozen=True)
class _GroupWriter:
    weights: Weights
    precision: WeightPrecision
    deltas: Deltas
    files: dict[Path, SafetensorsWriter]
    planned: dict[str, StoredTensor]

    def write(self, group: Group) -> None:
        """Write the tensors of one group: copied, changed some rows at a time, or changed as a whole."""
        stored = [self.weights.tensors[name] for name in group.names]
        changed = [path for path in group.paths if path in self.deltas]
        if not changed and not self.precision.rounds(self.weights, group):
            for name, tensor in zip(group.names, stored, strict=True):
                if self.planned[name].dtype == tensor.dtype:
                    self.files[tensor.file].copy(name, tensor)
                else:
                    self._put(name, read_tensor(tensor))
        elif group.converter is None and all(self.deltas[path].by_rows for path in changed):
            (name,), (path,) = group.names, group.paths
            for row, rows in self.precision.pieces(self.weights, path):
                self._put(name, self.deltas[path].apply(rows, row) if changed else rows, row)
        else:
            values = {path: self.precision(path, value) for path, value in self.weights.read_group(group).items()}
            for path in changed:
                values[path] = self.deltas[path].apply(values[path], 0)
            for name, value in self.weights.names_in_files(group, values).items():
                self._put(name, value)

    def _put(self, name: str, value: torch.Tensor, row: int = 0) -> None:
        self.files[self.planned[name].file].put(name, value, row)


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Say what became of `output` where the system refuses something while it is made, as a full disk does."""
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:
        explanation = explain_error(error)
        if explanation is None:
            raise
        message = f"{output}: was not written, and nothing of it was kept: {explanation}"
        raise type(explanation)(message) from error
