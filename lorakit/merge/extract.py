"""Extraction: two full checkpoints of one model -> the LoRA that leads from the one to the other, and what it keeps."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from lorakit.amounts import percent
from lorakit.atomic_io import atomic_dir
from lorakit.errors import UserError
from lorakit.merge.checkpoint_pair import CheckpointPair, open_pair, tuned_tokenizer
from lorakit.merge.low_rank import LowRankFactors, from_stacks
from lorakit.merge.peft_layout import AdapterLayer, adapter_layout, plain_lora_config, write_adapter, write_facts
from lorakit.merge.truncate import truncate_to_rank
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

What separates `{tuned}` from `{base}`, as a LoRA of rank {rank} taken out by lorakit {version}: for each linear
layer the largest singular directions of the difference. It keeps {kept} of the whole change (squared Frobenius
norm), and {kept_of_layers} of the change of its {modules} layers.
{more}"""


@dataclass(frozen=True)
class ExtractedLayer:
    """A weight whose change the adapter holds."""

    path: str
    rank: int
    change: float
    """Its share of the change of all weights (squared Frobenius norms)."""
    kept: float
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
    """A LoRA taken out of two checkpoints. Shares are of squared Frobenius norms, from 0 to 1."""

    folder: Path
    rank: int
    """The rank asked for; smaller weights have a smaller one, see `taken`."""
    taken: tuple[ExtractedLayer, ...]
    whole: tuple[str, ...]
    """Modules that the adapter brings whole."""
    left: tuple[SkippedWeight, ...]
    """The largest change first."""
    unchanged: int
    """Weights that are the same in both checkpoints."""
    kept: float
    """The share of the whole change that the adapter holds."""
    kept_of_layers: float
    """The share of the change of its low-rank layers that it holds."""
    parameters: int


@dataclass(frozen=True)
class _Found:
    factors: dict[AdapterLayer, LowRankFactors]
    kept: dict[str, float]
    """Squared norms by path, of what the factors hold; and of the changes below."""
    changes: dict[str, float]
    unchanged: int


def extract(
    tuned: Base, base: Base, rank: int, output: Path, progress: Progress, *, keep_whole: bool = False
) -> ExtractResult:
    """Write the LoRA that turns `base` into `tuned`, as nearly as its rank allows, to `output`, which is replaced.

    One weight of each checkpoint is in memory at a time. Changed weights that a LoRA cannot hold (norms, biases,
    embeddings, the output head) are left out and named.

    Args:
        rank: of every layer; a layer with fewer rows or columns gets as many as it has.
        keep_whole: bring the modules of such weights along whole where PEFT can (`modules_to_save`). Programs that
            serve adapters beside a model, such as vLLM, mostly refuse these.

    Raises:
        UserError: the checkpoints are of different models, nothing changed that a LoRA could hold, or a number in them
            is not finite.
    """
    if rank < 1:
        raise UserError(f"--rank: {rank} is not a rank. Write 1 or more, such as 32.")
    pair = open_pair(tuned, base, progress)
    tokenizer = tuned_tokenizer(tuned, base, progress)
    found = _factorized(pair, rank, progress)
    _check_changed(found, tuned, base, keep_whole)
    adapted = [layer.target.removesuffix(".weight") for layer in found.factors]
    whole, tied, reasons = pair.beside(found.changes, adapted, keep_whole)
    ranks = {layer: factors.rank for layer, factors in found.factors.items()}
    config = plain_lora_config(ranks, whole, tied)
    config.base_model_name_or_path = base.name
    tensors = _tensors(pair, base.folder, config, found, DTYPES[stored_dtype(tuned)])
    result = _result(output, rank, found, whole, reasons, sum(tensor.numel() for tensor in tensors.values()))
    with explain_full_disk(output), atomic_dir(output) as draft:
        write_adapter(draft, base.folder, config, tensors)
        if tokenizer is not None:
            write_tokenizer(tokenizer[1], tokenizer[0], draft)
        _describe(draft, result, tuned, base)
    return result


def _factorized(pair: CheckpointPair, rank: int, progress: Progress) -> _Found:
    """The factors of every changed layer, and the squared norm of every change."""
    factors, kept, changes, unchanged, capped = {}, {}, {}, 0, []
    with torch.no_grad(), progress.bar("differences", total=len(pair.paths)) as bar:
        for path in pair.paths:
            change = pair.change(path)
            size = _squared_norm(change)
            layer = pair.holders.get(path)
            if size == 0.0:
                unchanged += 1
            else:
                changes[path] = size
                if layer is not None:
                    factors[layer], kept[path] = _low_rank(change, layer, rank)
                    capped += [path] if factors[layer].rank < rank else []
            bar.advance()
    if capped:
        progress.say(f"{capped[0]}{_more(len(capped))} has fewer than {rank} rows or columns, and a rank of as many")
    return _Found(factors, kept, changes, unchanged)


def _squared_norm(change: torch.Tensor) -> float:
    """In float64, a piece at a time."""
    return sum(float(piece.double().square().sum()) for piece in change.flatten().split(_PIECE))


def _low_rank(change: torch.Tensor, layer: AdapterLayer, rank: int) -> tuple[LowRankFactors, float]:
    """The factors of a change, expert by expert, and the squared norm of what they hold."""
    matrices = change if change.ndim == 3 else change[None]
    found = [truncate_to_rank(matrix.mT if layer.turned else matrix, rank) for matrix in matrices]
    factors = from_stacks(torch.stack([one.a for one in found]), torch.stack([one.b for one in found]))
    return factors, sum(one.kept for one in found)


def _check_changed(found: _Found, tuned: Base, base: Base, keep_whole: bool) -> None:
    if not found.changes:
        raise UserError(f"{tuned.name} and {base.name} have the same weights: there is nothing to extract.")
    if not found.factors:
        path = max(found.changes, key=lambda path: found.changes[path])
        raise UserError(
            f"{tuned.name}: no linear layer differs from {base.name}, only {path}{_more(len(found.changes))}: no LoRA "
            "can hold that. Keep the tuned model whole."
        )


def _tensors(
    pair: CheckpointPair, base_folder: Path, config: LoraConfig, found: _Found, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of the adapter by PEFT's names: low-rank ones in float32, whole ones in `dtype`."""
    layout = adapter_layout(base_folder, config)
    by_path = {layer.path: factors for layer, factors in found.factors.items()}
    tensors = {}
    for layer in layout.layers:
        tensors[f"{layer.stem}.lora_A.weight"] = by_path[layer.path].a
        tensors[f"{layer.stem}.lora_B.weight"] = by_path[layer.path].b
    for name in layout.shapes.keys() - tensors.keys():
        tensors[name] = pair.tuned.read(name.removeprefix(_PREFIX)).to(dtype)
    return tensors


def _result(
    output: Path, rank: int, found: _Found, whole: Sequence[str], reasons: dict[str, str], parameters: int
) -> ExtractResult:
    total = sum(found.changes.values())
    ranks = {layer.path: factors.rank for layer, factors in found.factors.items()}
    taken = tuple(
        ExtractedLayer(path, its_rank, found.changes[path] / total, min(1.0, found.kept[path] / found.changes[path]))
        for path, its_rank in ranks.items()
    )
    left = [SkippedWeight(path, found.changes[path] / total, reason) for path, reason in reasons.items()]
    of_layers = sum(one.change * one.kept for one in taken)
    brought = sum(found.changes[path] for path in found.changes.keys() - ranks.keys() - reasons.keys()) / total
    return ExtractResult(
        folder=output,
        rank=rank,
        taken=taken,
        whole=tuple(whole),
        left=tuple(sorted(left, key=lambda one: -one.change)),
        unchanged=found.unchanged,
        kept=of_layers + brought,
        kept_of_layers=of_layers / sum(one.change for one in taken),
        parameters=parameters,
    )


def _describe(draft: Path, result: ExtractResult, tuned: Base, base: Base) -> None:
    facts = {
        "format": 1,
        "made": now(),
        "versions": versions(),
        **{
            role: {"name": one.name, "origin": one.origin, "sha256": one.sha256()}
            for role, one in (("tuned", tuned), ("base", base))
        },
        **{name: value for name, value in asdict(result).items() if name != "folder"},
    }
    write_facts(draft / FACTS, facts)
    more = "".join(f"\nBrought whole: `{name}`.\n" for name in result.whole)
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
        kept=percent(result.kept, 1),
        kept_of_layers=percent(result.kept_of_layers, 1),
        modules=len(result.taken),
        more=more,
    )
    (draft / "README.md").write_text(card, encoding="utf-8")


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
