"""What a merged folder says of itself: `merge.json` and the model card."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.amounts import percent
from lorakit.atomic_io import files_in, sha256_of
from lorakit.merge.inputs import MergeInput, Onto
from lorakit.merge.proof import TOLERANCES, Proof
from lorakit.run_dir import MERGED, now, versions

COMBINED = "combine.json"
"""The file by which a folder is known to hold combined adapters."""

_ROWS = {"held-out": "held-out rows", "training": "training rows", "general": "general texts"}


@dataclass(frozen=True)
class MergeResult:
    """A merged model and what is known of it."""

    folder: Path
    onto: Onto
    quantization: str
    """The base's, while the adapter was trained."""
    dtype: str
    """The coarsest type of its weights, by which it was judged."""
    rows_of: str
    """Which rows judged (lorakit.merge.inputs); empty where none did."""
    proof: Proof | None
    """Against the adapter on the weights that were merged into; None where none was asked for."""
    drift: Proof | None
    """Against the adapter on the weights that it was trained on, where those are others."""
    untied: bool = False
    """Whether it has two weights where its base ties them: the adapter changed one of them, or each otherwise."""


def merge_facts(merged: MergeResult) -> dict[str, Any]:
    """A merge as JSON."""
    proof, drift = merged.proof, merged.drift
    facts: dict[str, Any] = {
        "merged": str(merged.folder),
        "onto": merged.onto,
        "quantization": merged.quantization,
        "dtype": merged.dtype,
        "untied": merged.untied,
        "rows_of": merged.rows_of,
        "proof": proof.figures() if proof else None,
    }
    if drift:
        facts["drift"] = {**drift.figures(), "better": drift.better()}
    return facts


def figures_in_words(proof: Proof) -> str:
    """The figures of a proof over all rows, in a line."""
    return (
        f"largest logit difference {proof.max_logit_difference:.3g} of {proof.logit_scale:.3g}, mean KL "
        f"{proof.mean_kl:.2e} nats, top-1 agreement {percent(proof.top1_agreement, 2)}, loss "
        f"{proof.merged_loss:.4f} (adapter {proof.adapter_loss:.4f})"
    )


def judged_by(merged: MergeResult) -> str:
    """The rows that judged a merge, such as "12 held-out rows"."""
    assert merged.proof is not None
    return f"{merged.proof.rows} {_ROWS.get(merged.rows_of, f'rows of {merged.rows_of}')}"


def better_in_words(drift: Proof) -> str:
    """Which of merged model and adapter is better on the held-out rows, in a sentence."""
    if drift.better() == "cannot tell":
        return "Which of the two is better cannot be told from these rows."
    return f"The {'merged model' if drift.better() == 'merged' else 'adapter'} scores better on these rows."


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write the document by which a folder is known, with the names of the folder's files."""
    facts = {**facts, "files": sorted({*files_in(path.parent), path.name, "README.md"})}
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(folder: Path, title: str, base: str, kind: str, *paragraphs: str) -> None:
    """Write the README.md of a merged model, or of an adapter that is not `merged`."""
    library = "" if kind == "merged" else "library_name: peft\n"
    head = f"---\nbase_model: {base}\n{library}pipeline_tag: text-generation\ntags: [lora, lorakit, {kind}]\n---"
    text = "\n\n".join([head, f"# {title}", *paragraphs])
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def describe(draft: Path, given: MergeInput, merged: MergeResult) -> None:
    """Write `merge.json` and `README.md` into a merged folder."""
    proof, drift, combination = merged.proof, merged.drift, given.adapter / COMBINED
    is_combined = combination.is_file()
    facts = {
        "format": 2,
        "drift": None,
        **merge_facts(merged),
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
    write_facts(draft / MERGED, facts)
    what = "a combination of adapters" if is_combined else f"the adapter {'of the run ' * given.is_run}{given.name}"
    is_quantized = merged.quantization != "none"
    onto = f"its weights as dequantized from {merged.quantization}" if is_quantized else "its weights"
    onto = "its weights as they are on disk" if merged.onto == "original" else onto
    paragraphs = [f"`{given.base.name}` with {what} added to {onto}. Weights are in {merged.dtype}."]
    if proof:
        positions = f"{proof.positions:,} trained positions of {judged_by(merged)}"
        paragraphs.append(f"Compared with the adapter on the same weights, at {positions}: {figures_in_words(proof)}.")
    else:
        paragraphs.append("**Not compared with the adapter model** (`--no-proof`).")
    if drift:
        trained = merged.quantization if is_quantized else given.model.dtype
        against = f"the adapter on the weights that it was trained on ({trained}), on the same rows"
        paragraphs += [f"Compared with {against}: {figures_in_words(drift)}.", better_in_words(drift)]
    if merged.untied:
        paragraphs.append(
            "The base ties its output head to its input embeddings. The adapter changed them apart, so that here they "
            "are two weights (`tie_word_embeddings: false`)."
        )
    if merged.quantization == "q8" and given.on_gpu:
        paragraphs.append(
            "The adapter was trained on a GPU, where LLM.int8 rounds the inputs of every layer to 8 bits as well. The "
            "merged model does not, and neither did the adapter model that it was compared with."
        )
    write_card(draft, f"{given.name}, merged", given.base.name, "merged", *paragraphs)
