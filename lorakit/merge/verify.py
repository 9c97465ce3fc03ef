"""A merge that someone sent, proved anew."""

import json
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import LorakitError, UserError
from lorakit.merge.apply_delta import Folding, adapter_deltas
from lorakit.merge.card import FACTS
from lorakit.merge.case import (
    Case,
    MergeResult,
    Onto,
    check_proof,
    coarsest_dtype,
    plain_base,
    refuse_unmergeable,
    training_quantization,
)
from lorakit.merge.inputs import MergeInput, input_of_run
from lorakit.merge.untie import weights_to_write
from lorakit.merge.writer import with_tied
from lorakit.model.quantization_config import parse_quantization
from lorakit.model.quantized_weights import WeightPrecision, stored_precision, training_precision
from lorakit.model.safetensors_reader import TYPES
from lorakit.model.state_dict import Weights, open_weights
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run


def verify(run: Run, prepared: Prepared, folder: Path, progress: Progress) -> MergeResult:
    """Prove anew that a folder holds the merged model of a run; the folder is only read.

    Raises:
        UserError: the folder holds no plain model of the run's architecture.
        LorakitError: it does not predict what the run's adapter predicts.
    """
    return verify_input(input_of_run(run, prepared, progress), folder, progress)


def verify_input(given: MergeInput, folder: Path, progress: Progress) -> MergeResult:
    """`verify` for an adapter that need not be a run's.

    Raises:
        UserError, LorakitError: as `verify`.
    """
    facts, config = _facts_of(folder / FACTS), _facts_of(folder / "config.json")
    onto: Onto = "original" if facts.get("onto") == "original" else "trained"
    refuse_unmergeable(given.base, onto)
    if "model_type" not in config:
        raise UserError(f"{folder}: has no config.json that names a model_type, so it is not a model folder.")
    if config.get("auto_map"):
        raise UserError(f"{folder}: brings its own Python code (auto_map), which lorakit does not run.")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter beside its weights, which would be put on them once more.")
    if parse_quantization(config):
        raise UserError(f"{folder}: its weights are quantized, which no merge of lorakit's are. It cannot be proved.")
    with plain_base(given, given.folder / "verify", progress) as (base, settings):
        weights, merged = open_weights(base), open_weights(folder)
        _check_alike(weights, merged)
        used = [merged.tensors[name] for group in merged.groups for name in group.names]
        written = coarsest_dtype([tensor.dtype for tensor in used if tensor.is_plain])
        trained = training_precision(weights, settings)
        both = onto == "original" and trained.differs(weights)
        case = Case(given, weights, progress)
        holds = [stored_precision(settings), trained] if both else [trained]
        proof, drift = [*case.proofs(folder, written, holds), None][:2]
        assert proof is not None
        check_proof(proof, written, f"{folder}: this model", "")
        folding = adapter_deltas(case.adapter_model(holds[0]))
        target = weights_to_write(weights, folding)
        _check_weights(target, merged, holds[0], folding)
    untied = target is not weights
    return MergeResult(folder, onto, training_quantization(given), written, case.rows[1], proof, drift, untied)


def _facts_of(path: Path) -> dict[str, Any]:
    """What a file of a merged folder says, if it is there."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}.") from error
    return facts if isinstance(facts, dict) else {}


# Two machines may round the same sum to neighbours.
_NEIGHBOURS = 4


def _check_weights(base: Weights, merged: Weights, held: WeightPrecision, folding: Folding) -> None:
    """Compare each weight with what a merge writes: rows of the held-out set do not reach all of them."""
    folds = with_tied(base, folding.folds)
    for group in base.groups:
        values = {path: held(path, value) for path, value in base.read_group(group).items()}
        for path, value in values.items():
            if not value.is_floating_point():
                continue
            wanted = folds[path](value) if path in folds else value
            found = merged.read(path)
            stored = TYPES[merged.tensors[merged.group_of(path).names[0]].dtype]
            scale = wanted.abs() + wanted.square().mean().sqrt()
            if not bool(((found - wanted).abs() <= _NEIGHBOURS * torch.finfo(stored).eps * scale).all()):
                raise LorakitError(
                    f"{merged.folder}: {path} is not the base's weight with the adapter in it: this is no merge of "
                    "this run, or it was changed since."
                )


def _check_alike(base: Weights, merged: Weights) -> None:
    ours, theirs = (
        {path: tuple(value.shape) for path, value in weights.model.state_dict().items()} for weights in (base, merged)
    )
    if ours != theirs:
        apart = sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path))
        raise UserError(
            f"{merged.folder}: is a model of another shape than the run's base: {apart[0]} is "
            f"{theirs.get(apart[0], 'missing')} there and {ours.get(apart[0], 'missing')} in the base."
        )
