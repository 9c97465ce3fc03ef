"""What a merged folder says of itself: `merge.json` and the model card."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.amounts import percent
from lorakit.atomic_io import files_in, sha256_of
from lorakit.merge.combine import FACTS as COMBINED
from lorakit.merge.inputs import MergeInput
from lorakit.merge.proof import TOLERANCES, Proof
from lorakit.run_dir import MERGED, now, versions

if TYPE_CHECKING:
    from lorakit.merge.case import MergeResult

FACTS = MERGED

_CARD = """\
---
base_model: {base}
pipeline_tag: text-generation
tags: [lora, lorakit, merged]
---

# {name}, merged

`{base}` with {what} added to {onto}. Weights are in {dtype}.

{proof}{drift}{note}"""

_PROOF = """\
Compared with the adapter on the same weights, at {positions:,} trained positions of {rows} {rows_of}: largest
logit difference {difference:.3g} (logits reach {scale:.3g}), mean KL {kl:.2e} nats, top-1 agreement {top1}, loss
{merged_loss:.4f} against {adapter_loss:.4f}.
"""

_DRIFT = """
Compared with the adapter on the weights that it was trained on ({trained}), on the same rows: largest logit difference
{difference:.3g}, mean KL {kl:.2e} nats, top-1 agreement {top1}, loss {merged_loss:.4f} against {adapter_loss:.4f}.
{better}
"""

_BETTER = {
    "merged": "The merged model scores better on these rows.",
    "adapter": "The adapter scores better on these rows.",
    "cannot tell": "Which of the two is better cannot be told from these rows.",
}

_UNPROVED = "**Not compared with the adapter model** (`--no-proof`).\n"

_UNTIED = """
The base ties its output head to its input embeddings. The adapter changed them apart, so that here they are two weights
(`tie_word_embeddings: false`).
"""

_INT8_ON_GPU = """
The adapter was trained on a GPU, where LLM.int8 rounds the inputs of every layer to 8 bits as well. The merged model
does not, and neither did the adapter model that it was compared with.
"""


def onto_in_words(merged: "MergeResult") -> str:
    """The weights that were merged into, in a few words."""
    if merged.onto == "original":
        return "its weights as they lie on disk"
    if merged.quantization == "none":
        return "its weights"
    return f"its weights as dequantized from {merged.quantization}"


def better_in_words(drift: Proof) -> str:
    """Which of merged model and adapter is better on the held-out rows, in a sentence."""
    return _BETTER[drift.better()]


def describe(draft: Path, given: MergeInput, merged: "MergeResult") -> None:
    """Write `merge.json` and `README.md` into a merged folder."""
    combination = _combination(given.adapter)
    facts: dict[str, Any] = {
        "format": 2,
        "merged": now(),
        "versions": versions(),
        "run": given.name if given.is_run else None,
        "adapter": given.adapter.resolve().name,
        "base": {"name": given.base.name, "origin": given.base.origin, "sha256": given.base_sha256},
        "adapter_sha256": sha256_of(given.adapter / "adapter_model.safetensors"),
        "combined": combination,
        "onto": merged.onto,
        "quantization": merged.quantization,
        "dtype": merged.dtype,
        "untied": merged.untied,
        "rows_of": merged.rows_of if merged.proof else None,
        "tolerance": asdict(TOLERANCES[merged.dtype]),
        "proof": proof_facts(merged.proof) if merged.proof else None,
        "drift": proof_facts(merged.drift) | {"better": merged.drift.better()} if merged.drift else None,
    }
    facts["files"] = sorted({*files_in(draft), FACTS, "README.md"})
    (draft / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    drift = ""
    if merged.drift:
        drift = _DRIFT.format(
            trained=merged.quantization if merged.quantization != "none" else given.model.dtype,
            better=better_in_words(merged.drift),
            **_figures(merged.drift),
        )
    card = _CARD.format(
        base=given.base.name,
        name=given.name,
        what=f"the adapter {'of the run ' if given.is_run else ''}{given.name}"
        if combination is None
        else "a combination of adapters",
        onto=onto_in_words(merged),
        dtype=merged.dtype,
        proof=_PROOF.format(rows_of=rows_in_words(merged.rows_of), **_figures(merged.proof))
        if merged.proof
        else _UNPROVED,
        drift=drift,
        note=_notes(given, merged),
    )
    (draft / "README.md").write_text(card, encoding="utf-8")


def rows_in_words(rows_of: str) -> str:
    """Whose rows judged a merge."""
    known = {"held-out": "held-out rows", "training": "training rows", "general": "general texts"}
    return known.get(rows_of, f"rows of {rows_of}")


def _notes(given: MergeInput, merged: "MergeResult") -> str:
    on_gpu = merged.quantization == "q8" and given.on_gpu
    return (_UNTIED if merged.untied else "") + (_INT8_ON_GPU if on_gpu else "")


def _combination(adapter: Path) -> dict[str, Any] | None:
    """What a combined adapter was made of."""
    if not (adapter / COMBINED).is_file():
        return None
    facts: dict[str, Any] = json.loads((adapter / COMBINED).read_text(encoding="utf-8"))
    return facts


def proof_facts(proof: Proof) -> dict[str, Any]:
    """The figures of a proof over all rows, by name."""
    return {name: value for name, value in asdict(proof).items() if not name.startswith("row_")}


def _figures(proof: Proof) -> dict[str, Any]:
    return {
        "positions": proof.positions,
        "rows": proof.rows,
        "difference": proof.max_logit_difference,
        "scale": proof.logit_scale,
        "kl": proof.mean_kl,
        "top1": percent(proof.top1_agreement, 2),
        "merged_loss": proof.merged_loss,
        "adapter_loss": proof.adapter_loss,
    }
