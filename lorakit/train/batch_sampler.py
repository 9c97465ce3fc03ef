"""The optimizer steps of a run: which rows each one trains, and how they are laid out in micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Sampler

from lorakit.data.batches import collate, run_batches
from lorakit.data.conversations import IGNORED
from lorakit.data.mixture import Mixture
from lorakit.data.packing import collate_packed, first_fit_decreasing

Pack = list[dict[str, Any]]
"""What a micro-batch counts: one row alone, or the rows of one pack."""


@dataclass(frozen=True)
class Plan:
    """What the trainer needs to know of a run, in steps and rows."""

    batch_size: int
    micro_batch: int
    seed: int
    eval_steps: int
    keep: int
    pad_token_id: int
    longest: int
    """Tokens of the longest row, and so of a pack."""
    packing: bool = False
    flat: bool = False
    """Packs go end to end in one row, as variable-length attention takes them."""
    lora_plus: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    """The steps in which the learning rate rises."""


class StepBatchSampler(Sampler[list[int]]):
    """The rows of every step of one epoch, as Trainer counts epochs: all as long as the first.

    Weights make some epochs longer than others; then the steps of the run are only counted off in epochs of one size.
    """

    def __init__(self, lengths: Sequence[int], plan: Plan, mixture: Mixture | None = None) -> None:
        self.lengths, self.plan, self.epoch = lengths, plan, 0
        self.mixture = mixture or Mixture((len(lengths),), (1.0,))

    @property
    def batch_sampler(self) -> "StepBatchSampler":
        """Trainer hands the epoch to `dataloader.batch_sampler.batch_sampler`, where accelerate's wrapper would be."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * len(self)
        batches = run_batches(self.lengths, self.plan.batch_size, self.plan.seed, self.mixture, first)
        return islice(batches, len(self))

    def __len__(self) -> int:
        return max(1, self.mixture.steps_in(0, self.plan.batch_size))


def pack_rows(rows: Sequence[dict[str, Any]], plan: Plan) -> list[Pack]:
    """The rows of a step one by one, or in packs that are no longer than the run's longest row."""
    if not plan.packing:
        return [[row] for row in rows]
    packs = first_fit_decreasing([len(row["input_ids"]) for row in rows], plan.longest)
    return [[rows[index] for index in pack] for pack in packs]


def collate_packs(units: Sequence[Pack], plan: Plan) -> dict[str, Any]:
    """One micro-batch as tensors (rows or packs, tokens), and the places of its rows as `where`."""
    rows = [row for unit in units for row in unit]
    tensors = collate_packed(units, plan.pad_token_id, plan.flat) if plan.packing else collate(rows, plan.pad_token_id)
    return {**tensors, "where": [row["where"] for row in rows]}


def count_trained_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """Over how many tokens the loss of some rows is the mean; nothing stands before a row's first."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
