"""Batches: which rows each optimizer step trains, and how rows of several lengths become one tensor.

The order depends on the rows, the seed, the epoch and the effective batch size alone, never on how a batch is split:
that is what makes the result independent of the machine.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from lorakit.data.encoded import IGNORED

Row = TypeVar("Row")

# Batches sorted together by length: enough to save most padding, few enough to keep batches varied.
_POOL = 32


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, weights: np.ndarray | None = None
) -> list[list[int]]:
    """The rows of every optimizer step of one epoch, longest first within a step.

    Rows are shuffled, sorted by length within pools of 32 batches, and cut into batches whose order is shuffled again.
    The rows left over when the number is no multiple of `batch_size` come last. `weights`: how often each row is
    drawn in an epoch, see `draws`; None is once.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    if weights is None:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    else:
        order = _drawn(weights, generator)
    whole = len(order) - len(order) % batch_size
    order, rest = order[:whole], order[whole:]
    batches: list[list[int]] = []
    for start in range(0, whole, batch_size * _POOL):
        pool = sorted(order[start : start + batch_size * _POOL], key=lambda row: -lengths[row])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return [*batches, sorted(rest, key=lambda row: -lengths[row])] if rest else batches


def draws(count: int, weights: np.ndarray | None) -> int:
    """How many rows an epoch draws from `count` rows: of those with weight w, w times their number, rounded."""
    if weights is None:
        return count
    kinds, counts = np.unique(weights, return_counts=True)
    return sum(round(float(weight) * int(many)) for weight, many in zip(kinds, counts, strict=True))


def _drawn(weights: np.ndarray, generator: torch.Generator) -> list[int]:
    """Every row as often as the whole part of its weight, and of the rest as many rows as its fraction comes to."""
    drawn = []
    for weight in np.unique(weights):
        rows = torch.from_numpy(np.flatnonzero(weights == weight))
        whole, wanted = int(weight), round(float(weight) * len(rows))
        drawn += [rows] * whole
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[: wanted - whole * len(rows)]])
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)].tolist()


def split_batch(rows: Sequence[Row], micro_batch: int) -> list[list[Row]]:
    """The micro-batches of one optimizer step."""
    return [list(rows[at : at + micro_batch]) for at in range(0, len(rows), micro_batch)]


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of input_ids and labels as right-padded tensors (rows, tokens) with their attention mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.as_tensor(row["input_ids"])
        labels[index, :length] = torch.as_tensor(row["labels"])
        mask[index, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
