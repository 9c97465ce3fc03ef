"""What `lorakit merge` prints of what was made."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.amounts import percent

if TYPE_CHECKING:
    from lorakit.merge.case import MergeResult
    from lorakit.merge.combine_runs import CombineRunsResult
    from lorakit.merge.extract import ExtractResult
    from lorakit.merge.proof import Proof

_SHOWN = 12


def merged_facts(merged: "MergeResult") -> dict[str, Any]:
    """A merge as JSON."""
    from lorakit.merge.card import proof_facts

    facts: dict[str, Any] = {
        "merged": str(merged.folder),
        "onto": merged.onto,
        "quantization": merged.quantization,
        "dtype": merged.dtype,
        "untied": merged.untied,
        "rows_of": merged.rows_of,
        "proof": proof_facts(merged.proof) if merged.proof else None,
    }
    if merged.drift:
        facts["drift"] = proof_facts(merged.drift) | {"better": merged.drift.better()}
    return facts


def merged_text(merged: "MergeResult") -> str:
    """Where the merged model lies, and how it was proved."""
    first = f"merged model: {merged.folder}"
    if merged.untied:
        first += (
            "\ninput and output embeddings are two weights: the adapter changed them apart (tie_word_embeddings: false)"
        )
    if merged.proof is None:
        return f"{first}\nnot compared with the adapter model (--no-proof)"
    return "\n".join([first, _proved(merged.proof, merged.rows_of), *_drift(merged)])


def verified_text(merged: "MergeResult", run: Path) -> str:
    """That a folder was found to be the merged model of a run."""
    assert merged.proof is not None
    first = f"{merged.folder}: is the merged model of {run}"
    return "\n".join([first, _proved(merged.proof, merged.rows_of), *_drift(merged)])


def _proved(proof: "Proof", rows_of: str) -> str:
    from lorakit.merge.card import rows_in_words

    return f"proved on {proof.positions:,} positions of {proof.rows} {rows_in_words(rows_of)}: {_figures(proof)}"


def _figures(proof: "Proof") -> str:
    return (
        f"largest logit difference {proof.max_logit_difference:.3g} of {proof.logit_scale:.3g}, mean KL "
        f"{proof.mean_kl:.2e} nats, top-1 agreement {percent(proof.top1_agreement, 2)}, loss "
        f"{proof.merged_loss:.4f} (adapter {proof.adapter_loss:.4f})"
    )


def _drift(merged: "MergeResult") -> list[str]:
    from lorakit.merge.card import better_in_words

    if merged.drift is None:
        return []
    against = f"against the adapter on the weights that it was trained on ({merged.quantization})"
    return [f"drift {against}: {_figures(merged.drift)}", better_in_words(merged.drift)]


def combined_facts(made: "CombineRunsResult") -> dict[str, Any]:
    """A combination as JSON."""
    facts: dict[str, Any] = {"combined": asdict(made.combined) | {"folder": str(made.combined.folder)}}
    facts["scores"] = [asdict(score) | {"kept": score.kept} for score in made.scores]
    return facts | {"without_held_out_rows": made.without}


def combined_table(made: "CombineRunsResult") -> tuple[str, list[str], list[list[str]]]:
    """The loss of every source's held-out rows before and after."""
    rows = [
        [
            score.run,
            f"{score.rows:,}",
            f"{score.base:.4f}",
            f"{score.own:.4f}",
            f"{score.combined:.4f}",
            "-" if score.kept is None else percent(score.kept),
        ]
        for score in made.scores
    ]
    return "loss on each run's held-out rows", ["run", "rows", "base", "its adapter", "combined", "gain kept"], rows


def combined_text(made: "CombineRunsResult") -> str:
    """Where the combination lies, and what it is."""
    one = made.combined
    lines = [] if made.merged else [f"adapter: {one.folder}"]
    lines.append(
        f"{one.method} of {len(one.sources)} adapters: rank {one.rank}, {one.modules} modules, {one.parameters:,} "
        f"parameters; {percent(one.off_sum, 1)} away from the weighted sum of their changes"
    )
    lines += [f"{run}: has no held-out rows that can be read, and was not scored" for run in made.without]
    return "\n".join(lines)


def extracted_facts(extracted: "ExtractResult") -> dict[str, Any]:
    """An extraction as JSON."""
    return asdict(extracted) | {"folder": str(extracted.folder)}


def extracted_table(extracted: "ExtractResult") -> tuple[str, list[str], list[list[str]]]:
    """The changed weights that the adapter does not hold, the largest change first."""
    rows = [[one.path, percent(one.change, 2), one.reason] for one in extracted.left[:_SHOWN]]
    more = len(extracted.left) - len(rows)
    title = "changed, and not in the adapter" + (f" (and {more} more)" if more else "")
    return title, ["weight", "share of the change", "because"], rows


def extracted_text(extracted: "ExtractResult") -> str:
    """Where the adapter lies, and what of the change it holds."""
    layers = f"{len(extracted.taken)} layers" + (f", {len(extracted.whole)} modules whole" if extracted.whole else "")
    return (
        f"adapter: {extracted.folder}\n"
        f"rank {extracted.rank}, {layers}, {extracted.parameters:,} parameters: holds "
        f"{percent(extracted.kept, 1)} of the change (squared Frobenius norm), "
        f"{percent(extracted.kept_of_layers, 1)} of that of its layers"
    )
