"""The rows of each optimizer step, and how they become the tensors of micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Sampler

from lorakit.data.batches import collate, collate_packed, first_fit_decreasing, run_batches
from lorakit.data.conversations import IGNORED
from lorakit.data.mixture import Mixture

Pack = list[dict[str, Any]]
"""What a micro-batch counts: the rows of one pack, or one row alone where the run does not pack."""


class StepBatchSampler(Sampler[list[int]]):
    """The rows of every step of one epoch, as Trainer counts epochs: all as long as the first.

    Weights make some epochs longer than others; then the steps of the run are only counted off in epochs of one size.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, mixture: Mixture) -> None:
        self.lengths, self.batch_size, self.seed, self.mixture = lengths, batch_size, seed, mixture
        self.epoch = 0

    @property
    def batch_sampler(self) -> "StepBatchSampler":
        """Trainer hands the epoch to `dataloader.batch_sampler.batch_sampler`, where accelerate's wrapper would be."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * len(self)
        return islice(run_batches(self.lengths, self.batch_size, self.seed, self.mixture, first), len(self))

    def __len__(self) -> int:
        return max(1, self.mixture.steps_in(0, self.batch_size))


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a step are laid out in tensors."""

    pad_token_id: int
    pack_length: int | None = None
    """The most tokens of a pack; None where rows are not packed."""
    flat: bool = False
    """Packs go end to end in one row, as variable-length attention takes them."""

    def pack(self, rows: Sequence[dict[str, Any]]) -> list[Pack]:
        """The rows of a step one by one, or in packs."""
        if self.pack_length is None:
            return [[row] for row in rows]
        packs = first_fit_decreasing([len(row["input_ids"]) for row in rows], self.pack_length)
        return [[rows[index] for index in pack] for pack in packs]

    def collate(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """One micro-batch as tensors (rows or packs, tokens), and the places of its rows as `where`."""
        rows = [row for pack in packs for row in pack]
        if self.pack_length is None:
            tensors = collate(rows, self.pad_token_id)
        else:
            tensors = collate_packed(packs, self.pad_token_id, self.flat)
        return {**tensors, "where": [row["where"] for row in rows]}


def count_trained_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """The tokens over which the loss of some rows is the mean; a row's first token has nothing before it."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
