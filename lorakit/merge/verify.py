"""A merge that someone sent, proved anew."""

import json
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.merge.card import FACTS
from lorakit.merge.case import Case, Merged, Onto, check_proof, coarsest, plain_base, refuse_unmergeable, trained_in
from lorakit.model.held import held_as_stored, held_by
from lorakit.model.stored import quantization_in
from lorakit.model.weights import Weights, open_weights
from lorakit.plan.prepare import Prepared
from lorakit.progress import Progress
from lorakit.runs import Run


def verify(run: Run, prepared: Prepared, folder: Path, progress: Progress) -> Merged:
    """Prove anew that a folder holds the merged model of a run; the folder is only read.

    Raises:
        UserError: the folder holds no plain model of the run's architecture.
        LorakitError: it does not predict what the run's adapter predicts.
    """
    facts, config = _facts_of(folder / FACTS), _facts_of(folder / "config.json")
    onto: Onto = "original" if facts.get("onto") == "original" else "trained"
    refuse_unmergeable(run, prepared, onto)
    if "model_type" not in config:
        raise UserError(f"{folder}: has no config.json that names a model_type, so it is no model folder.")
    if quantization_in(config):
        raise UserError(f"{folder}: its weights are quantized, which no merge of lorakit's are. It cannot be proved.")
    with plain_base(prepared, run.folder / "verify", progress) as (base, settings):
        weights, merged = open_weights(base), open_weights(folder)
        _check_alike(weights, merged)
        written = coarsest([tensor.dtype for tensor in merged.tensors.values() if tensor.is_plain])
        trained = held_by(weights, settings)
        both = onto == "original" and trained.differs(weights)
        case = Case(run, prepared, weights, run.adapter, progress)
        holds = [held_as_stored(settings), trained] if both else [trained]
        proof, drift = [*case.proofs(folder, written, holds), None][:2]
    assert proof is not None
    check_proof(proof, written, f"{folder}: this model", "")
    return Merged(folder, onto, trained_in(prepared), written, case.rows_of, proof, drift)


def _facts_of(path: Path) -> dict[str, Any]:
    """What a file of a merged folder says, if it is there."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}.") from error
    return facts if isinstance(facts, dict) else {}


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
