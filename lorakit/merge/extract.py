"""Extraction: two full checkpoints of one model -> the LoRA that leads from the one to the other, and what it keeps."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lorakit.amounts import percent
from lorakit.atomic_io import atomic_dir
from lorakit.errors import UserError
from lorakit.merge.card import write_facts
from lorakit.merge.checkpoint_pair import CheckpointPair, open_pair, tuned_tokenizer
from lorakit.merge.low_rank import LowRankFactors, from_stacks, truncate_to_rank
from lorakit.merge.peft_layout import AdapterLayer, adapter_layout, plain_lora_config, write_adapter
from lorakit.merge.writer import explain_full_disk
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.resolve import Base
from lorakit.model.tokenizer_files import write_tokenizer
from lorakit.progress import Progress
from lorakit.run_dir import now, versions

FACTS = "extract.json"
"""The file by which a folder is known to hold an extracted adapter."""
_PIECE = 1 << 22
_PREFIX = "base_model.model."  # what PEFT puts before the names of the model's own modules

_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, lorakit, extracted]
---

# {name}

The difference of `{tuned}` from `{base}`, as a LoRA of rank {rank} extracted by lorakit {version}: for each linear
layer the largest singular directions of the difference. It keeps {share} of the whole change (squared Frobenius
norm), and {share_of_layers} of the change of its {modules} layers.
{more}"""


@dataclass(frozen=True)
class ExtractedLayer:
    """A weight whose change the adapter holds."""

    path: str
    rank: int
    change: float
    """Its share of the change of all weights (squared Frobenius norms)."""
    share: float
    """The share of its own change that the adapter holds."""


@dataclass(frozen=True)
class SkippedWeight:
    """A changed weight that the adapter does not hold."""

    path: str
    change: float
    """Its share of the change of all weights."""
    reason: str


@dataclass(frozen=True)
class ExtractResult:
    """A LoRA extracted from two checkpoints. Shares are of squared Frobenius norms, from 0 to 1."""

    folder: Path
    rank: int
    """The rank that was asked for; smaller weights have a smaller one, see `layers`."""
    layers: tuple[ExtractedLayer, ...]
    whole: tuple[str, ...]
    """Modules that the adapter holds whole."""
    left: tuple[SkippedWeight, ...]
    """The largest change first."""
    unchanged: int
    """Weights that are the same in both checkpoints."""
    share: float
    """The share of the whole change that the adapter holds."""
    share_of_layers: float
    """The share of the change of its low-rank layers that it holds."""
    parameters: int

    def facts(self) -> dict[str, Any]:
        """What `extract.json` and `--json` say, by their keys."""
        layers = [{"path": one.path, "rank": one.rank, "change": one.change, "kept": one.share} for one in self.layers]
        return {
            "rank": self.rank,
            "taken": layers,
            "whole": self.whole,
            "left": [asdict(one) for one in self.left],
            "unchanged": self.unchanged,
            "kept": self.share,
            "kept_of_layers": self.share_of_layers,
            "parameters": self.parameters,
        }


@dataclass(frozen=True)
class _Changes:
    """Squared norms of the changes by path, the factors of those that a LoRA can hold, and how many are zero."""

    norms: dict[str, float]
    factors: dict[AdapterLayer, LowRankFactors]
    unchanged: int


def extract(
    tuned: Base, base: Base, rank: int, output: Path, progress: Progress, *, keep_whole: bool = False
) -> ExtractResult:
    """Write the LoRA that turns `base` into `tuned`, as nearly as its rank allows, to `output`, which is replaced.

    One weight of each checkpoint is in memory at a time. Changed weights that a LoRA cannot hold (norms, biases,
    embeddings, the output head) are left out and named.

    Args:
        rank: of every layer; a layer with fewer rows or columns gets as many as it has.
        keep_whole: add the modules of such weights whole where PEFT can (`modules_to_save`). Programs that serve
            adapters beside a model, such as vLLM, mostly refuse these.

    Raises:
        UserError: the checkpoints are of different models, nothing changed that a LoRA could hold, or a number in them
            is not finite.
    """
    if rank < 1:
        raise UserError(f"--rank: {rank} is not a rank. Write 1 or more, such as 32.")
    pair = open_pair(tuned, base, progress)
    tokenizer = tuned_tokenizer(tuned, base, progress)
    changes = _factorize(pair, rank, progress)
    if not changes.norms:
        raise UserError(f"{tuned.name} and {base.name} have the same weights: there is nothing to extract.")
    if not changes.factors:
        path = max(changes.norms, key=lambda path: changes.norms[path])
        raise UserError(
            f"{tuned.name}: no linear layer differs from {base.name}, only {path}{_more(len(changes.norms))}: no LoRA "
            "can hold that. Keep the tuned model whole."
        )
    adapted = [layer.target.removesuffix(".weight") for layer in changes.factors]
    whole, tied, reasons = pair.sort_out_others(changes.norms, adapted, keep_whole)
    config = plain_lora_config({layer: factors.rank for layer, factors in changes.factors.items()}, whole, tied)
    config.base_model_name_or_path = base.name
    tensors = _name_tensors(pair, base.folder, config, changes, DTYPES[stored_dtype(tuned)])
    size = sum(tensor.numel() for tensor in tensors.values())
    result = _summarize(output, rank, changes, whole, reasons, size)
    with explain_full_disk(output), atomic_dir(output) as draft:
        write_adapter(draft, base.folder, config, tensors)
        if tokenizer is not None:
            write_tokenizer(tokenizer[1], tokenizer[0], draft)
        _describe(draft, result, tuned, base)
    return result


def _factorize(pair: CheckpointPair, rank: int, progress: Progress) -> _Changes:
    norms, factors, unchanged = {}, {}, 0
    with torch.no_grad(), progress.bar("differences", total=len(pair.paths)) as bar:
        for path in pair.paths:
            change = pair.change(path)
            norm = sum(float(piece.double().square().sum()) for piece in change.flatten().split(_PIECE))
            if norm == 0.0:
                unchanged += 1
            else:
                norms[path] = norm
                if layer := pair.holders.get(path):
                    matrices = change if change.ndim == 3 else change[None]  # one for each expert
                    low = [truncate_to_rank(one.mT if layer.transposed else one, rank) for one in matrices]
                    factors[layer] = from_stacks(
                        torch.stack([one.a for one in low]), torch.stack([one.b for one in low])
                    )
            bar.advance()
    capped = [layer.path for layer, of_layer in factors.items() if of_layer.rank < rank]
    if capped:
        progress.say(f"{capped[0]}{_more(len(capped))} has fewer than {rank} rows or columns, and a rank of as many")
    return _Changes(norms, factors, unchanged)


def _name_tensors(
    pair: CheckpointPair, base_folder: Path, config: LoraConfig, changes: _Changes, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of the adapter by PEFT's names: low-rank ones in float32, whole ones in `dtype`."""
    layers, shapes = adapter_layout(base_folder, config)
    by_path = {layer.path: factors for layer, factors in changes.factors.items()}
    tensors = {}
    for layer in layers:
        tensors[f"{layer.stem}.lora_A.weight"] = by_path[layer.path].a
        tensors[f"{layer.stem}.lora_B.weight"] = by_path[layer.path].b
    for name in shapes.keys() - tensors.keys():
        tensors[name] = pair.tuned.read(name.removeprefix(_PREFIX)).to(dtype)
    return tensors


def _summarize(
    output: Path, rank: int, changes: _Changes, whole: Sequence[str], reasons: dict[str, str], size: int
) -> ExtractResult:
    norms, total = changes.norms, sum(changes.norms.values())
    layers = []
    for layer, factors in changes.factors.items():
        norm = norms[layer.path]
        layers.append(ExtractedLayer(layer.path, factors.rank, norm / total, min(1.0, factors.squared_norm() / norm)))
    left = [SkippedWeight(path, norms[path] / total, reason) for path, reason in reasons.items()]
    of_layers = sum(one.change * one.share for one in layers)
    in_whole = norms.keys() - {one.path for one in layers} - reasons.keys()
    return ExtractResult(
        folder=output,
        rank=rank,
        layers=tuple(layers),
        whole=tuple(whole),
        left=tuple(sorted(left, key=lambda one: -one.change)),
        unchanged=changes.unchanged,
        share=of_layers + sum(norms[path] for path in in_whole) / total,
        share_of_layers=of_layers / sum(one.change for one in layers),
        parameters=size,
    )


def _describe(draft: Path, result: ExtractResult, tuned: Base, base: Base) -> None:
    models = {
        role: {"name": one.name, "origin": one.origin, "sha256": one.sha256()}
        for role, one in (("tuned", tuned), ("base", base))
    }
    write_facts(draft / FACTS, {"format": 1, "made": now(), "versions": versions(), **models, **result.facts()})
    more = "".join(f"\nHeld whole: `{name}`.\n" for name in result.whole)
    if result.left:
        share = sum(one.change for one in result.left)
        more += (
            f"\nIt does not hold the change of {len(result.left)} other weights, {percent(share, 1)} of the whole, "
            f"such as `{result.left[0].path}`.\n"
        )
    card = _CARD.format(
        base=base.name,
        tuned=tuned.name,
        name=result.folder.name,
        rank=result.rank,
        version=versions().get("lorakit", ""),
        share=percent(result.share, 1),
        share_of_layers=percent(result.share_of_layers, 1),
        modules=len(result.layers),
        more=more,
    )
    (draft / "README.md").write_text(card, encoding="utf-8")


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
