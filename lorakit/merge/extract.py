"""Extraction: two full checkpoints of one model -> the LoRA that leads from the one to the other, and what it keeps."""

from pathlib import Path
from typing import Any

import torch

from lorakit.amounts import percent
from lorakit.atomic_io import atomic_dir
from lorakit.errors import UserError
from lorakit.merge.card import write_card, write_facts
from lorakit.merge.checkpoint_pair import CheckpointPair, open_pair, tuned_tokenizer
from lorakit.merge.low_rank import LowRankFactors, from_stacks, truncate_to_rank
from lorakit.merge.peft_layout import (
    PREFIX,
    AdapterLayer,
    adapter_layout,
    name_factors,
    plain_lora_config,
    write_adapter,
)
from lorakit.merge.writer import explain_full_disk
from lorakit.model.companion_files import write_tokenizer
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.resolve import Base
from lorakit.progress import Progress
from lorakit.run_dir import now, versions

FACTS = "extract.json"
"""The file by which a folder is known to hold an extracted adapter."""
_PIECE = 1 << 22


def extract(
    tuned: Base, base: Base, rank: int, output: Path, progress: Progress, *, keep_whole: bool = False
) -> dict[str, Any]:
    """Write the LoRA that turns `base` into `tuned`, as nearly as its rank allows, to `output`, which is replaced.

    One weight of each checkpoint is in memory at a time. Changed weights that a LoRA cannot hold (norms, biases,
    embeddings, the output head) are left out and named.

    Args:
        rank: of every layer; a layer with fewer rows or columns gets as many as it has.
        keep_whole: add the modules of such weights whole where PEFT can (`modules_to_save`). Programs that serve
            adapters beside a model, such as vLLM, mostly refuse these.

    Returns:
        What `extract.json` says of the adapter (docs/merging.md).

    Raises:
        UserError: the checkpoints are of different models, nothing changed that a LoRA could hold, or a number in them
            is not finite.
    """
    if rank < 1:
        raise UserError(f"--rank: {rank} is not a rank. Write 1 or more, such as 32.")
    pair = open_pair(tuned, base, progress)
    tokenizer = tuned_tokenizer(tuned, base, progress)
    norms, factors = _factorize(pair, rank, progress)
    if not norms:
        raise UserError(f"{tuned.name} and {base.name} have the same weights: there is nothing to extract.")
    if not factors:
        path = max(norms, key=lambda path: norms[path])
        raise UserError(
            f"{tuned.name}: no linear layer differs from {base.name}, only {path}{_more(len(norms))}: no LoRA "
            "can hold that. Keep the tuned model whole."
        )
    adapted = [layer.target.removesuffix(".weight") for layer in factors]
    whole, tied, reasons = pair.sort_out_others(norms, adapted, keep_whole)
    config = plain_lora_config(factors, whole, tied)
    config.base_model_name_or_path = base.name
    layers, shapes = adapter_layout(base.folder, config)
    by_path = {layer.path: of_layer for layer, of_layer in factors.items()}
    tensors = name_factors({layer: by_path[layer.path] for layer in layers})
    for name in shapes.keys() - tensors.keys():
        tensors[name] = pair.tuned.read(name.removeprefix(PREFIX)).to(DTYPES[stored_dtype(tuned)])
    size, unchanged = sum(tensor.numel() for tensor in tensors.values()), len(pair.paths) - len(norms)
    summary = {"rank": rank, "whole": whole, "unchanged": unchanged, "parameters": size}
    summary |= _summarize(norms, factors, reasons)
    with explain_full_disk(output), atomic_dir(output) as draft:
        write_adapter(draft, config, tensors)
        if tokenizer is not None:
            write_tokenizer(tokenizer[1], tokenizer[0], draft)
        _describe(draft, output.name, summary, tuned, base)
    return summary


def _factorize(
    pair: CheckpointPair, rank: int, progress: Progress
) -> tuple[dict[str, float], dict[AdapterLayer, LowRankFactors]]:
    """The squared norm of each change by path, and the factors of those that a LoRA can hold."""
    norms, factors = {}, {}
    with torch.no_grad(), progress.bar("differences", total=len(pair.paths)) as bar:
        for path in pair.paths:
            change = pair.change(path)
            norm = sum(float(piece.double().square().sum()) for piece in change.flatten().split(_PIECE))
            if norm:
                norms[path] = norm
            if norm and (layer := pair.holders.get(path)):
                matrices = change if change.ndim == 3 else change[None]  # one for each expert
                low = [truncate_to_rank(matrix.mT if layer.transposed else matrix, rank) for matrix in matrices]
                a, b = torch.stack([one.a for one in low]), torch.stack([one.b for one in low])
                factors[layer] = from_stacks(a, b)
            bar.advance()
    capped = [layer.path for layer, of_layer in factors.items() if of_layer.rank < rank]
    if capped:
        progress.say(f"{capped[0]}{_more(len(capped))} has fewer than {rank} rows or columns, and a rank of as many")
    return norms, factors


def _summarize(
    norms: dict[str, float], factors: dict[AdapterLayer, LowRankFactors], reasons: dict[str, str]
) -> dict[str, Any]:
    """Shares of squared norms, by their keys in `extract.json`."""
    shares = {path: norm / sum(norms.values()) for path, norm in norms.items()}
    layers: list[dict[str, Any]] = []
    for layer, of_layer in factors.items():
        share = min(1.0, of_layer.squared_norm() / norms[layer.path])
        layers.append({"path": layer.path, "rank": of_layer.rank, "change": shares[layer.path], "kept": share})
    left: list[dict[str, Any]] = [
        {"path": path, "change": shares[path], "reason": reason} for path, reason in reasons.items()
    ]
    of_layers = sum(layer["change"] * layer["kept"] for layer in layers)
    in_whole = shares.keys() - {layer["path"] for layer in layers} - reasons.keys()
    return {
        "taken": layers,
        "left": sorted(left, key=lambda one: -one["change"]),
        "kept": of_layers + sum(shares[path] for path in in_whole),
        "kept_of_layers": of_layers / sum(layer["change"] for layer in layers),
    }


def _describe(draft: Path, name: str, summary: dict[str, Any], tuned: Base, base: Base) -> None:
    facts: dict[str, Any] = {"format": 1, "made": now(), "versions": versions()}
    for role, model in (("tuned", tuned), ("base", base)):
        facts[role] = {"name": model.name, "origin": model.origin, "sha256": model.sha256()}
    write_facts(draft / FACTS, facts | summary)
    paragraphs = [
        f"The difference of `{tuned.name}` from `{base.name}`, as a LoRA of rank {summary['rank']} extracted by "
        f"lorakit {versions().get('lorakit', '')}: the largest singular directions of each linear layer's change. It "
        f"keeps {percent(summary['kept'], 1)} of the whole change (squared Frobenius norm), and "
        f"{percent(summary['kept_of_layers'], 1)} of the change of its {len(summary['taken'])} layers.",
        *(f"Held whole: `{module}`." for module in summary["whole"]),
    ]
    if left := summary["left"]:
        share = percent(sum(one["change"] for one in left), 1)
        paragraphs.append(
            f"It does not hold the change of {len(left)} other weights, {share} of the whole, such as "
            f"`{left[0]['path']}`."
        )
    write_card(draft, name, base.name, "extracted", *paragraphs)


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
