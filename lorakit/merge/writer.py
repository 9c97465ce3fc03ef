"""Writing results: the card of a merge, a combination or an extraction, and a merged model's weights: the base's files
once more, tensor by tensor, with the adapter in them."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorakit.amounts import decimal_bytes
from lorakit.atomic_io import files_in
from lorakit.errors import LorakitError, UserError
from lorakit.merge.apply_delta import Deltas
from lorakit.model.base_files import INDEX, SINGLE, read_header, weight_files
from lorakit.model.config_values import read_json
from lorakit.model.safetensors_io import WORDS, SafetensorsWriter, open_writer, read_tensor
from lorakit.model.state_dict import Group, WeightPrecision, Weights, untied
from lorakit.progress import Progress

COMBINED = "combine.json"  # by which a folder is known to hold combined adapters
_OTHER_FILES = 64 << 20  # what tokenizer, configuration and card may take


def describe_output(
    draft: Path, document: str, facts: dict[str, Any], title: str, base: str, kind: str, *paragraphs: str
) -> None:
    """Write the document by which a folder is known, with the names of its files, and its card, a README.md. `kind`:
    merged for a model, combined or extracted for an adapter."""
    facts = {**facts, "files": sorted({*files_in(draft), document, "README.md"})}
    (draft / document).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    library = "" if kind == "merged" else "library_name: peft\n"
    head = f"---\nbase_model: {base}\n{library}pipeline_tag: text-generation\ntags: [lora, lorakit, {kind}]\n---"
    (draft / "README.md").write_text("\n\n".join([head, f"# {title}", *paragraphs]) + "\n", encoding="utf-8")


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
        writers: dict[str, SafetensorsWriter] = {}
        for file in weight_files(weights.folder):
            tensors = {name: tensor for name, tensor in planned.items() if tensor.file == file}
            writer = opened.enter_context(open_writer(folder / file.name, tensors, read_header(file)[1]))
            writers |= dict.fromkeys(tensors, writer)
        deltas = with_tied_names(weights, deltas)
        total = sum(tensor.size for tensor in weights.tensors.values())
        bar = opened.enter_context(progress.bar("merging", total=total, unit="bytes"))
        for group in sorted(groups, key=lambda group: min(order[name] for name in group.names)):
            _write_group(group, weights, precision, deltas, writers)
            bar.advance(sum(weights.tensors[name].size for name in group.names))
    if {tensor.file.name for tensor in planned.values()} != {SINGLE}:
        index = read_json(weights.folder / INDEX)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
        index["weight_map"] = {name: tensor.file.name for name, tensor in planned.items()}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sorted({planned[name].dtype for group in weights.groups for name in group.names if planned[name].is_plain})


def _write_group(
    group: Group, weights: Weights, precision: WeightPrecision, deltas: Deltas, writers: dict[str, SafetensorsWriter]
) -> None:
    """Write the tensors of one group: copied, changed some rows at a time, or changed as a whole."""
    changed = [path for path in group.paths if path in deltas]
    if not changed and not precision.rounds(weights, group):
        for name in group.names:
            tensor = weights.tensors[name]
            if writers[name].places[name].dtype == tensor.dtype:
                writers[name].copy(name, tensor)
            else:
                writers[name].put(name, read_tensor(tensor))
    elif group.converter is None and all(deltas[path].by_rows for path in changed):
        (name,), (path,) = group.names, group.paths
        for row, rows in precision.pieces(weights, path):
            writers[name].put(name, deltas[path].apply(rows, row) if changed else rows, row)
    else:
        values = {path: precision(path, value) for path, value in weights.read_group(group).items()}
        values |= {path: deltas[path].apply(values[path], 0) for path in changed}
        for name, value in weights.names_in_files(group, values).items():
            writers[name].put(name, value)
