"""Merging: the adapter of a run folded into its base, and proved before it is called done."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit.errors import LorakitError, UserError
from lorakit.folders import alone, remove_drafts, whole_folder
from lorakit.merge.card import FACTS, describe
from lorakit.merge.fold import folding_of
from lorakit.merge.proof import TOLERANCES, Proof, compare, reference
from lorakit.merge.write import full_disk_told, write_the_rest, write_weights
from lorakit.model.checkpoint import TYPES
from lorakit.model.held import Held, HeldWeights, held_as_stored, held_by
from lorakit.model.load import DTYPES, load_model, pad_token_id, stored_dtype, supports_sdpa
from lorakit.model.quantized import dequantized, quantization_of
from lorakit.model.stored import check_mergeable, quantization_in, stored_quantization
from lorakit.model.streamed import streamed_adapter_model, streamed_model
from lorakit.model.weights import Weights, open_weights
from lorakit.plan.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.kinds import trains_all
from lorakit.recipe.schema import Model
from lorakit.runs import Run

Onto = Literal["trained", "original"]


@dataclass(frozen=True)
class Merged:
    """A merged model and what is known of it."""

    folder: Path
    onto: Onto
    quantization: str
    """In which the adapter was trained on the base."""
    dtype: str
    """The coarsest type of its weights, by which it was judged."""
    rows_of: str
    proof: Proof | None
    """Against the adapter on the weights that were merged into; None where none was asked for."""
    drift: Proof | None
    """Against the adapter on the weights that it was trained on, where those are others."""


def check_target(output: Path, overwrite: bool, facts: str = FACTS) -> None:
    """Refuse a place where a result cannot go; nothing but an earlier one, which holds the file `facts`, is replaced.

    Raises:
        UserError: something is there, or the place cannot be written.
    """
    if output.exists() or output.is_symlink():
        if not (output / facts).is_file():
            raise UserError(
                f"{output}: is there, and holds no {facts}, so lorakit merge did not write it and does not replace it. "
                "Choose another with --output."
            )
        if not overwrite:
            raise UserError(
                f"{output}: is there already. Replace it with --overwrite, or choose another with --output."
            )
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".lorakit-draft."):
            pass
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written: {error.strerror or error}. Choose another with --output."
        ) from error


def merge(
    run: Run,
    prepared: Prepared,
    output: Path,
    progress: Progress,
    onto: Onto = "trained",
    dtype: str | None = None,
    proved: bool = True,
    adapter: Path | None = None,
) -> Merged:
    """Write the merged model of a run to `output`, where it appears only when the proof holds.

    `trained` adds the adapter to the weights that it saw while it trained: rounded to the type of the training, and,
    of a quantized base, dequantized as its quantizer does. `original` adds it to the weights as they lie in the base's
    files. All is added in float32 and rounded once, to the type in which each tensor is stored or to `dtype`.

    Args:
        adapter: another one than the run's own, on the same base.

    Raises:
        UserError: there is no adapter, or it or the base are of a kind that cannot be merged.
        LorakitError: the disk is full, or the merged files do not predict what the adapter model predicts.
    """
    _check_mergeable(run, prepared, onto)
    _check_apart(output, run, prepared)
    with alone(output, "merging into"), full_disk_told(output):
        remove_drafts(output.absolute().parent, output.name)
        with _plain_base(prepared, output, progress) as (folder, settings), whole_folder(output) as draft:
            weights = open_weights(folder)
            trained, chosen = held_by(weights, settings), held_as_stored(settings)
            if onto == "trained":
                chosen = trained
            case = _Case(run, prepared, weights, adapter or run.adapter, progress)
            given = _given_type(prepared, dtype)
            folding = folding_of(case.adapter_model(trained))
            types = write_weights(weights, chosen, folding, given, draft, progress)
            write_the_rest(folder, prepared.tokenizer, prepared.stop_ids, given, draft)
            written = _coarsest(types)
            holds = [chosen, trained] if onto == "original" and trained.differs(weights) else [chosen]
            proofs = case.proofs(draft, written, holds) if proved else []
            proof, drift = [*proofs, None, None][:2]
            if proof:
                _check(proof, written, f"{output}: the merged model", " It was not put in place.")
            merged = Merged(output, onto, settings.quantization, written, case.rows_of, proof, drift)
            describe(draft, run, prepared, merged, adapter)
    return merged


def verify(run: Run, prepared: Prepared, folder: Path, progress: Progress) -> Merged:
    """Prove anew that a folder holds the merged model of a run; the folder is only read.

    Raises:
        UserError: the folder holds no plain model of the run's architecture.
        LorakitError: it does not predict what the run's adapter predicts.
    """
    facts, config = _facts_of(folder / FACTS), _facts_of(folder / "config.json")
    onto: Onto = "original" if facts.get("onto") == "original" else "trained"
    _check_mergeable(run, prepared, onto)
    if "model_type" not in config:
        raise UserError(f"{folder}: has no config.json that names a model_type, so it is no model folder.")
    if quantization_in(config):
        raise UserError(f"{folder}: its weights are quantized, which no merge of lorakit's are. It cannot be proved.")
    with _plain_base(prepared, run.folder / "verify", progress) as (base, settings):
        weights, merged = open_weights(base), open_weights(folder)
        _check_alike(weights, merged)
        written = _coarsest([tensor.dtype for tensor in merged.tensors.values() if tensor.is_plain])
        trained = held_by(weights, settings)
        both = onto == "original" and trained.differs(weights)
        case = _Case(run, prepared, weights, run.adapter, progress)
        holds = [held_as_stored(settings), trained] if both else [trained]
        proof, drift = [*case.proofs(folder, written, holds), None][:2]
    assert proof is not None
    _check(proof, written, f"{folder}: this model", "")
    return Merged(folder, onto, settings.quantization, written, case.rows_of, proof, drift)


@dataclass(frozen=True)
class _Case:
    """An adapter, the weights it stands on, and the rows by which merges of it are judged."""

    run: Run
    prepared: Prepared
    weights: Weights
    adapter: Path
    progress: Progress

    @property
    def rows_of(self) -> str:
        return "held-out" if self.prepared.held_out else "training"

    @property
    def _attention(self) -> str:
        named = self.prepared.model.attention
        if named == "eager" or not supports_sdpa(self.prepared.base):
            return "eager"
        return "sdpa"  # which predicts the same as kernels that need a GPU

    def adapter_model(self, held: Held) -> Any:
        base = HeldWeights(self.weights, held)
        folder = self.weights.folder
        return streamed_adapter_model(folder, self._attention, base.read, self.adapter, base.pieces)

    def proofs(self, merged: Path, written: str, holds: list[Held]) -> list[Proof]:
        """The merged folder against the adapter on each way of holding its base, on the same rows."""
        pad = pad_token_id(self.prepared.tokenizer)
        rows = list((self.prepared.held_out or self.prepared.train).rows)
        expected = [reference(self.adapter_model(held), rows, pad, self.progress) for held in holds]
        written_weights = open_weights(merged)
        found = streamed_model(merged, self._attention, written_weights.read, written_weights.pieces)
        return compare(expected, found, pad, TOLERANCES[written].tie, self.progress)


def _check(proof: Proof, written: str, what: str, behind: str) -> None:
    failures = proof.failures(TOLERANCES[written])
    if failures:
        raise LorakitError(f"{what} does not answer as the adapter does: {'; '.join(failures)}.{behind}")


def _check_mergeable(run: Run, prepared: Prepared, onto: Onto) -> None:
    if trains_all(prepared.recipe.adapter):
        raise UserError(
            f"{run.folder}: there is no adapter to merge: this run trained the weights themselves. Its model is "
            f"{run.model}."
        )
    check_mergeable(prepared.base)
    stored = stored_quantization(prepared.base.folder)
    if stored and onto == "original":
        raise UserError(
            f"--onto original: the weights of {prepared.base.name} are {stored.quantization} on disk: there are no "
            "full-precision ones to merge into. Leave --onto out."
        )


def _check_apart(output: Path, run: Run, prepared: Prepared) -> None:
    """An earlier merge may be the base of this one, or hold the run; replacing it would take both away."""
    for needed in (prepared.base.folder, run.folder):
        if needed.resolve().is_relative_to(output.resolve()):
            raise UserError(f"{output}: is what the merge stands on, or holds it ({needed}). Choose another --output.")


@contextmanager
def _plain_base(prepared: Prepared, output: Path, progress: Progress) -> Iterator[tuple[Path, Model]]:
    """The base's folder, and how its weights were held in training.

    Of a checkpoint that is quantized itself it is a copy with plain weights, which exists only inside.
    """
    settings = prepared.model
    if stored_quantization(prepared.base.folder) is None:
        yield prepared.base.folder, settings
        return
    progress.say(f"{prepared.base.name}: dequantizing the checkpoint, which takes the memory of the whole model")
    exact = settings.model_copy(update={"dtype": "float32", "attention": "eager"})
    model = load_model(prepared.base, exact, "cpu")
    plain = dequantized(model) if quantization_of(model) else model
    prefix = f".lorakit-draft.{output.name}.base."
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=prefix) as folder:
        plain.save_pretrained(folder)
        del model, plain
        yield Path(folder), settings.model_copy(update={"quantization": "none"})


def _given_type(prepared: Prepared, dtype: str | None) -> torch.dtype | None:
    """The one type that all weights are rounded to; None where each keeps its own."""
    if dtype is None and stored_quantization(prepared.base.folder):
        dtype = stored_dtype(prepared.base)
    return DTYPES[dtype] if dtype else None


def _coarsest(types: list[str]) -> str:
    """The coarsest of safetensors' types, as a word of ours."""
    by_coarseness = ["bfloat16", "float16", "float32"]
    words = {str(TYPES[word]).removeprefix("torch.") for word in types}
    return next((word for word in by_coarseness if word in words), "float32")


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
