"""Merging: an adapter added to its base, and proved before it is put in place; and the proof of an existing merge."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.amounts import percent
from lorakit.atomic_io import sha256_of
from lorakit.distributed.processes import from_first, is_first, on_first, refuse, together
from lorakit.distributed.sharing import opened_by_first
from lorakit.errors import LorakitError, UserError
from lorakit.merge.apply_delta import Deltas, adapter_deltas
from lorakit.merge.inputs import MergeInput, Onto, adapter_model, unquantized_base
from lorakit.merge.proof import TOLERANCES, Proof, ReferenceLogits, compare, compute_reference
from lorakit.merge.writer import COMBINED, describe_output, weights_to_write, with_tied_names, write_weights
from lorakit.model.base_files import refuse_code
from lorakit.model.companion_files import write_companion_files
from lorakit.model.config_values import read_json, untied_config
from lorakit.model.layerwise import layerwise_model
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.peft_adapter import is_no_op
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.safetensors_io import TYPES
from lorakit.model.state_dict import WeightPrecision, Weights, open_weights, stored_precision, training_precision
from lorakit.model.tokenizer import pad_token_id
from lorakit.output_dir import output_draft, refuse_overwriting_inputs
from lorakit.progress import Progress
from lorakit.recipe.schema import Model
from lorakit.run_dir import MERGED, now, versions

# Two machines may round the same sum to neighbours.
_NEIGHBOURS = 4
_ROWS = {"held-out": "held-out rows", "training": "training rows", "general": "general texts"}


@dataclass(frozen=True)
class MergeResult:
    """A merged model and what is known of it."""

    folder: Path
    onto: Onto
    quantization: str  # the base's, while the adapter was trained
    dtype: str  # the coarsest type of its weights, by which it was judged
    rows_of: str  # which rows judged (lorakit.merge.inputs); empty where none did
    proof: Proof | None  # against the adapter on the weights that were merged into; None where none was asked for
    drift: Proof | None  # against the adapter on the weights that it was trained on, where those are others
    untied: bool  # has two weights where its base ties them: the adapter changed one of them, or each otherwise

    def facts(self) -> dict[str, Any]:
        """The merge as JSON."""
        facts: dict[str, Any] = {"merged": str(self.folder), "onto": self.onto, "quantization": self.quantization}
        facts |= {"dtype": self.dtype, "untied": self.untied, "rows_of": self.rows_of}
        facts["proof"] = self.proof.figures() if self.proof else None
        return facts | ({"drift": {**self.drift.figures(), "better": self.drift.better()}} if self.drift else {})

    def in_words(self) -> list[str]:
        """How it was proved, a line for each fact."""
        lines = []
        if self.untied:
            lines.append("input and output embeddings are two weights, untied: the adapter changed them apart")
        if self.proof is None:
            return [*lines, "not compared with the adapter model (--no-proof)"]
        rows = f"{self.proof.rows} {_ROWS.get(self.rows_of, f'rows of {self.rows_of}')}"
        lines.append(f"proved on {self.proof.positions:,} positions of {rows}: {_figures_in_words(self.proof)}")
        if self.drift:
            against = f"against the adapter on the weights that it was trained on ({self.quantization})"
            lines.append(f"drift {against}: {_figures_in_words(self.drift)}")
            better = {"merged": "The merged model scores", "adapter": "The adapter scores"}.get(self.drift.better())
            unknown = "Which of the two is better cannot be told from these rows."
            lines.append(f"{better} better on these rows." if better else unknown)
        return lines


def _figures_in_words(proof: Proof) -> str:
    return (
        f"largest logit difference {proof.max_logit_difference:.3g} of {proof.logit_scale:.3g}, mean KL "
        f"{proof.mean_kl:.2e} nats, top-1 agreement {percent(proof.top1_agreement, 2)}, loss "
        f"{proof.merged_loss:.4f} (adapter {proof.adapter_loss:.4f})"
    )


def merge(
    given: MergeInput,
    output: Path,
    progress: Progress,
    onto: Onto = "trained",
    dtype: str | None = None,
    proved: bool = True,
) -> MergeResult:
    """Write a merged model to `output`, a claimed place, where it appears only when the proof holds.

    `trained` adds the adapter to the weights that it saw while it trained: rounded to the type of the training, and, of
    a quantized base, dequantized as its quantizer does. `original` adds it to the weights as they are in the base's
    files. All is added in float32 and rounded once, to the type in which each tensor is stored or to `dtype`.
    """
    refuse_overwriting_inputs(output, given.base.source, given.folder, given.adapter, *given.files)
    if dtype is None and stored_quantization(given.base.folder):
        dtype = stored_dtype(given.base)
    with (
        opened_by_first(lambda: output_draft(output)) as draft,
        opened_by_first(lambda: unquantized_base(given, onto, output, progress)) as (folder, settings),
    ):
        written, untied, precisions = on_first(lambda: _write(given, folder, settings, onto, dtype, draft, progress))
        proof, drift, rows_of = None, None, ""
        if proved:
            proof, drift, rows_of = _prove(given, folder, draft, written, precisions, progress, output)
        merged = MergeResult(output, onto, given.quantization, written, rows_of, proof, drift, untied)
        on_first(lambda: _describe(draft, given, merged))
    return merged


def _write(
    given: MergeInput, base: Path, settings: Model, onto: Onto, dtype: str | None, draft: Path, progress: Progress
) -> tuple[str, bool, list[WeightPrecision]]:
    """Write the weights of the folder `base` with the adapter in them, and what lies beside them: the coarsest type,
    whether two weights were tied before, and the precisions of `_precisions`."""
    weights = open_weights(base)
    precisions = _precisions(weights, settings, onto)
    if is_no_op(given.adapter):
        progress.warn(f"{given.adapter}: changes nothing: one half of each of its changes is zero")
    deltas = adapter_deltas(adapter_model(given, weights, precisions[0]))
    target = weights_to_write(weights, deltas)
    untied = target is not weights
    one_type = DTYPES[dtype] if dtype else None
    written = coarsest_dtype(write_weights(target, precisions[0], deltas, one_type, draft, progress))
    config = read_json(given.base.folder / "config.json")
    config = untied_config(config) if untied else config
    write_companion_files(given.base.folder, given.tokenizer, given.stop_ids, config, draft, dtype)
    return written, untied, precisions


def _precisions(weights: Weights, settings: Model, onto: Onto) -> list[WeightPrecision]:
    """The precision of the base that is merged into, and that of the training where it is another one."""
    trained = training_precision(weights, settings)
    return [stored_precision(settings), trained] if onto == "original" and trained.differs(weights) else [trained]


def _describe(draft: Path, given: MergeInput, merged: MergeResult) -> None:
    combination = given.adapter / COMBINED
    is_combined = combination.is_file()
    facts = {
        "format": 2,
        "drift": None,
        **merged.facts(),
        "merged": now(),
        "versions": versions(),
        "run": given.name if given.is_run else None,
        "adapter": given.adapter.resolve().name,
        "base": {"name": given.base.name, "origin": given.base.origin, "sha256": given.base_sha256},
        "adapter_sha256": sha256_of(given.adapter / "adapter_model.safetensors"),
        "combined": json.loads(combination.read_text(encoding="utf-8")) if is_combined else None,
        "rows_of": merged.rows_of or None,
        "tolerance": asdict(TOLERANCES[merged.dtype]),
    }
    what = "a combination of adapters" if is_combined else f"the adapter {'of the run ' * given.is_run}{given.name}"
    weights = "weights" if merged.quantization == "none" else f"weights as dequantized from {merged.quantization}"
    weights = "weights as they are on disk" if merged.onto == "original" else weights
    paragraphs = [f"`{given.base.name}` with {what} added to its {weights}. Weights are in {merged.dtype}."]
    paragraphs.append("\n".join(f"- {line[0].upper()}{line[1:]}" for line in merged.in_words()))
    if merged.quantization == "q8" and given.rounds_int8_inputs:
        paragraphs.append(
            "The adapter was trained on a GPU, where LLM.int8 rounds the inputs of every layer to 8 bits as well. The "
            "merged model does not, and neither did the adapter model that it was compared with."
        )
    describe_output(draft, MERGED, facts, f"{given.name}, merged", given.base.name, "merged", *paragraphs)


def _prove(
    given: MergeInput,
    base: Path,
    folder: Path,
    dtype: str,
    precisions: list[WeightPrecision],
    progress: Progress,
    output: Path | None = None,
) -> tuple[Proof, Proof | None, str]:
    """Compare a merged folder, the draft of `output` if there is one, with the adapter on the weights of the folder
    `base`: the proof, the drift from the adapter in training if that differs, and which rows judged. `dtype`: the
    coarsest of the weights. Processes on machines that do not see the folders leave the rows to the others."""
    sees, pad = all(one.is_dir() for one in (base, folder, given.adapter)), pad_token_id(given.tokenizer)
    rows, rows_of = together(lambda: given.read_rows() if is_first() else ([], ""))
    weights = together(lambda: open_weights(base) if sees else None)

    def reference_of(precision: WeightPrecision) -> ReferenceLogits:
        model = together(lambda: adapter_model(given, weights, precision) if weights else None)
        return compute_reference(model, rows, pad, progress)

    def merged_model() -> Any:
        merged = open_weights(folder)
        return layerwise_model(folder, given.attention, merged.read, merged.pieces)

    expected = [reference_of(precision) for precision in precisions]
    model = together(lambda: merged_model() if sees else None)
    proof, *drift = compare(expected, model, pad, TOLERANCES[dtype].tie, progress)
    if failures := proof.failures(TOLERANCES[dtype]):
        what = f"{output}: the merged model" if output else f"{folder}: this model"
        consequence = " It was not put in place." if output else ""
        refuse(LorakitError(f"{what} does not answer as the adapter does: {'; '.join(failures)}.{consequence}"))
    return proof, drift[0] if drift else None, from_first(rows_of)


def coarsest_dtype(types: list[str]) -> str:
    """The coarsest of safetensors' types, in torch's words."""
    words = {str(TYPES[word]).removeprefix("torch.") for word in types}
    return next((word for word in ("bfloat16", "float16", "float32") if word in words), "float32")


def verify(given: MergeInput, folder: Path, progress: Progress) -> MergeResult:
    """Prove again that a folder holds the merged model of an adapter; the folder is only read. A UserError if it holds
    no plain model of the base's architecture, a LorakitError if it predicts something else."""
    onto = on_first(lambda: _check_folder(folder))
    with opened_by_first(lambda: unquantized_base(given, onto, given.folder / "verify", progress)) as (base, settings):

        def compare_shapes() -> tuple[str, list[WeightPrecision]]:
            weights, merged = open_weights(base), open_weights(folder)
            _check_shapes(weights, merged)
            used = [merged.tensors[name] for group in merged.groups for name in group.names]
            dtype = coarsest_dtype([tensor.dtype for tensor in used if tensor.is_plain])
            return dtype, _precisions(weights, settings, onto)

        def compare_weights() -> bool:
            weights = open_weights(base)
            deltas = adapter_deltas(adapter_model(given, weights, precisions[0]))
            target = weights_to_write(weights, deltas)
            _check_weights(target, open_weights(folder), precisions[0], with_tied_names(target, deltas))
            return target is not weights

        dtype, precisions = on_first(compare_shapes)
        proof, drift, rows_of = _prove(given, base, folder, dtype, precisions, progress)
        untied = on_first(compare_weights)
    return MergeResult(folder, onto, given.quantization, dtype, rows_of, proof, drift, untied)


def _check_folder(folder: Path) -> Onto:
    """Refuse what is no plain model; what a merged one was merged onto."""
    if "model_type" not in read_json(folder / "config.json"):
        remedy = f"Did you mean {folder / 'merged'}?" if (folder / "merged").is_dir() else "Give a merged model."
        raise UserError(f"--verify {folder}: not a model folder: it has no config.json with a model_type. {remedy}")
    refuse_code(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter beside its weights, which would be applied twice.")
    if stored_quantization(folder):
        raise UserError(f"{folder}: its weights are quantized, and lorakit merges into unquantized ones only.")
    return "original" if read_json(folder / MERGED).get("onto") == "original" else "trained"


def _check_shapes(base: Weights, merged: Weights) -> None:
    expected, shapes = (
        {path: tuple(value.shape) for path, value in weights.model.state_dict().items()} for weights in (base, merged)
    )
    path = min((path for path in {*expected, *shapes} if expected.get(path) != shapes.get(path)), default=None)
    if path:
        raise UserError(
            f"{merged.folder}: is a model of another shape than the run's base: {path} is "
            f"{shapes.get(path, 'missing')} there and {expected.get(path, 'missing')} in the base."
        )


def _check_weights(base: Weights, merged: Weights, precision: WeightPrecision, deltas: Deltas) -> None:
    """Compare each weight with what a merge writes: rows of the held-out set do not reach all of them."""
    for group in base.groups:
        for path, stored in base.read_group(group).items():
            value = precision(path, stored)
            if not value.is_floating_point():
                continue
            expected = deltas[path].apply(value, 0) if path in deltas else value
            step = torch.finfo(TYPES[merged.tensors[merged.group_of(path).names[0]].dtype]).eps
            scale = expected.abs() + expected.square().mean().sqrt()
            if not bool(((merged.read(path) - expected).abs() <= _NEIGHBOURS * step * scale).all()):
                raise LorakitError(
                    f"{merged.folder}: {path} is not the base's weight with the adapter in it: this is not a merge of "
                    "this run, or it was changed since."
                )
