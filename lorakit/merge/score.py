"""Whether a combination hurts: the held-out rows of every run that went into it, scored before and after."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.data.batches import collate, split_batch
from lorakit.errors import LorakitError
from lorakit.model.fused_lora import fused_lora
from lorakit.model.load import load_model
from lorakit.model.loss import supervised_loss
from lorakit.model.shared_base import SharedBase
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run

_LOSS_ROWS = 8


@dataclass(frozen=True)
class SourceScore:
    """The mean cross-entropy over the trained tokens of one run's held-out rows, in nats, of three models."""

    run: str
    rows: int
    base: float
    own: float
    """With the run's own adapter."""
    combined: float

    @property
    def kept(self) -> float | None:
        """The share of what the run's adapter gained over the base that the combination keeps: 1 is all of it, 0 and
        less is none. None where it gained nothing."""
        return (self.base - self.combined) / (self.base - self.own) if self.own < self.base else None


def score_sources(
    runs: Sequence[tuple[Run, Prepared]], combined: Path, progress: Progress
) -> tuple[list[SourceScore], list[str]]:
    """The scores of every run that has held-out rows, and the names of those that have none.

    The base is loaded once, as the first run held it while training, and one adapter at a time is put on it.

    Args:
        combined: the folder of an adapter of the same base.

    Raises:
        UserError: an adapter does not fit the base.
        LorakitError: a loss is no number.
    """
    scored = [(run, prepared) for run, prepared in runs if prepared.rows.held_out_if_there is not None]
    without = [str(run.folder) for run, prepared in runs if prepared.rows.held_out_if_there is None]
    if not scored:
        return [], without
    first = runs[0][1]
    shared = SharedBase(lambda: load_model(first.base, first.model, first.machine.device))
    base = _losses(shared.model_with(None), scored, "base", progress)
    own = [_losses(shared.model_with(run.adapter), [(run, own)], "its adapter", progress)[0] for run, own in scored]
    after = _losses(shared.model_with(combined), scored, "combined", progress)
    return [
        SourceScore(str(run.folder), len(_rows(prepared)), *losses)
        for (run, prepared), *losses in zip(scored, base, own, after, strict=True)
    ], without


def _losses(model: Any, runs: list[tuple[Run, Prepared]], label: str, progress: Progress) -> list[float]:
    """A model's losses on the rows of some runs."""
    with fused_lora(model):
        return [_loss(model, prepared, f"{run.folder.name}: {label}", progress) for run, prepared in runs]


def _rows(prepared: Prepared) -> list[dict[str, Any]]:
    """The held-out rows that the recipe scores on."""
    assert prepared.held_out is not None
    rows, wanted = prepared.held_out.rows, prepared.recipe.evaluate.rows
    return list(rows if wanted == "all" else rows.select(range(min(int(wanted), len(rows)))))


def _loss(model: Any, prepared: Prepared, label: str, progress: Progress) -> float:
    rows = sorted(_rows(prepared), key=lambda row: len(row["input_ids"]))
    total, tokens = 0.0, 0
    with torch.inference_mode(), progress.bar(label, total=len(rows)) as bar:
        for batch in split_batch(rows, _LOSS_ROWS):
            tensors = collate(batch, pad_token_id(prepared.tokenizer))
            summed, count = supervised_loss(model, **{key: value.to(model.device) for key, value in tensors.items()})
            total, tokens = total + float(summed), tokens + count
            bar.advance(len(batch))
    if not math.isfinite(total):
        raise LorakitError(f"{label}: the loss is {total}: this model gives no numbers on the held-out rows.")
    return total / tokens
