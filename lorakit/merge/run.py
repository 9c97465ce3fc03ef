"""Merging: the adapter of a run folded into the weights that it was trained on, and proved before it is called done."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UserError
from lorakit.folders import remove_drafts, whole_folder
from lorakit.merge.proof import TOLERANCES, Proof, compare, reference
from lorakit.model.attach import load_adapter
from lorakit.model.base import Base
from lorakit.model.load import DTYPES, load_model, pad_token_id, stored_dtype
from lorakit.model.quantized import dequantized, quantization_of
from lorakit.model.stored import check_mergeable
from lorakit.plan.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.kinds import trains_all
from lorakit.recipe.schema import Model
from lorakit.runs import Run, now, versions

_FACTS = "merge.json"

_CARD = """\
---
base_model: {base}
pipeline_tag: text-generation
tags: [lora, lorakit, merged]
---

# {name}, merged

`{base}` with the adapter of the run {name} folded into {onto}, in {dtype}.

Compared with the adapter model at {positions:,} trained positions of {rows} {source} rows: largest logit difference
{difference:.3g} (logits reach {scale:.3g}), mean KL {kl:.2e} nats, top-1 agreement {top1:.2%}, loss {merged_loss:.4f}
against {adapter_loss:.4f}.
{note}"""

_INT8_ON_GPU = """
The adapter was trained on a GPU, where LLM.int8 rounds the inputs of every layer to 8 bits as well. The merged model
does not, and neither did the adapter model that it was compared with.
"""


def check_target(run: Run, output: Path, overwrite: bool) -> None:
    """Refuse a place where a merged model cannot go; nothing but an earlier merge is ever replaced.

    Raises:
        UserError: something is there, or the place cannot be written.
    """
    if output.exists() or output.is_symlink():
        if not (output / _FACTS).is_file():
            raise UserError(f"{output}: is no merged model, and is not replaced. Choose another with --output.")
        if not overwrite:
            raise UserError(
                f"{output}: is there already. Replace it with --overwrite, or choose another with --output."
            )
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(output.absolute().parent, output.name)
        with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".lorakit-draft."):
            pass
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written: {error.strerror or error}. Choose another with --output."
        ) from error


def merge(run: Run, prepared: Prepared, output: Path, progress: Progress) -> Proof:
    """Write the merged model of a run to `output`, where it appears only when the proof holds.

    A quantized base is dequantized as its quantizer does: those are the weights that the adapter was trained on. (On a
    GPU, LLM.int8 rounded the inputs of its layers too, which neither of the models compared here does.) Weights are
    added in float32 and rounded once to the type in which the base is stored.

    Raises:
        UserError: the checkpoint is quantized in a way that cannot be undone.
        LorakitError: the merged files do not predict what the adapter model predicts.
    """
    if trains_all(prepared.recipe.adapter):
        raise UserError(
            f"{run.folder}: there is no adapter to merge: this run trained the weights themselves. Its model is "
            f"{run.model}."
        )
    check_mergeable(prepared.base)
    dtype, pad = stored_dtype(prepared.base), pad_token_id(prepared.tokenizer)
    rows, source = (prepared.held_out, "held-out") if prepared.held_out else (prepared.train, "training")
    exact = _exact(prepared.model)
    model = load_model(prepared.base, exact, "cpu")
    held = quantization_of(model)
    model = load_adapter(model, run.adapter)
    expected = reference(model, list(rows.rows), pad, progress)
    if held:
        model = load_adapter(dequantized(load_model(prepared.base, exact, "cpu")), run.adapter)
    merged = _folded(model, prepared, dtype)
    with whole_folder(output) as draft:
        progress.say(f"writing {dtype} weights")
        merged.save_pretrained(draft)
        prepared.tokenizer.save_pretrained(draft)
        del model, merged
        plain = exact.model_copy(update={"quantization": "none"})
        found = load_model(Base(str(output), draft, "merged"), plain, "cpu")
        tolerance = TOLERANCES[dtype]
        proof = compare(expected, found, pad, tolerance.tie, progress)
        failures = proof.failures(tolerance)
        if failures:
            raise LorakitError(
                f"{output}: the merged model does not answer as the adapter does: {'; '.join(failures)}. It was not "
                "put in place."
            )
        _describe(draft, run, prepared, proof, dtype, source, held.quantization if held else "none")
    return proof


def _exact(settings: Model) -> Model:
    """The settings by which a model is computed on the CPU in full precision: attention kernels may need a GPU."""
    attention = settings.attention if settings.attention in ("eager", "sdpa") else "eager"
    return settings.model_copy(update={"dtype": "float32", "attention": attention})


def _folded(model: Any, prepared: Prepared, dtype: str) -> Any:
    """The base's own architecture with the adapter added to its weights, ready to be saved."""
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"adapter: cannot be merged: {error}") from error
    merged = merged.to(DTYPES[dtype])
    merged.config.dtype = DTYPES[dtype]
    merged.generation_config.eos_token_id = prepared.stop_ids
    return merged


def _describe(
    draft: Path, run: Run, prepared: Prepared, proof: Proof, dtype: str, source: str, quantization: str
) -> None:
    onto = "its weights" if quantization == "none" else f"its weights as dequantized from {quantization}"
    on_gpu = run.read_manifest()["machine"]["device"] == "cuda"
    facts = {
        "format": 1,
        "merged": now(),
        "versions": versions(),
        "base": prepared.base.name,
        "onto": onto,
        "dtype": dtype,
        "rows_of": source,
        "tolerance": asdict(TOLERANCES[dtype]),
        "proof": asdict(proof),
    }
    (draft / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    card = _CARD.format(
        base=prepared.base.name,
        name=prepared.recipe.name,
        onto=onto,
        dtype=dtype,
        positions=proof.positions,
        rows=proof.rows,
        source=source,
        difference=proof.max_logit_difference,
        scale=proof.logit_scale,
        kl=proof.mean_kl,
        top1=proof.top1_agreement,
        merged_loss=proof.merged_loss,
        adapter_loss=proof.adapter_loss,
        note=_INT8_ON_GPU if quantization == "q8" and on_gpu else "",
    )
    (draft / "README.md").write_text(card, encoding="utf-8")
