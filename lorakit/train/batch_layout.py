"""How the rows of a step become tensors: alone or in packs, cut into micro-batches, on the device that computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.data.batches import collate, collate_packed, first_fit_decreasing
from lorakit.data.micro_batches import cut_micro_batches, fill_micro_batches, padded_tokens
from lorakit.data.rows import IGNORED
from lorakit.model.trained_tokens import TrainedTokens, find_trained_tokens

Pack = list[dict[str, Any]]  # what a micro-batch counts: the rows of one pack, or one row where the run does not pack


def without_labels(row: dict[str, Any]) -> dict[str, Any]:
    """The row with nothing to train: its loss and its gradients are zero."""
    return row | {"labels": [IGNORED] * len(row["labels"])}


def count_trained_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """The tokens over which the loss of some rows is the mean; a row's first token has nothing before it."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def length_of(pack: Pack) -> int:
    """The tokens of a pack."""
    return sum(len(row["input_ids"]) for row in pack)


@dataclass(frozen=True)
class MicroBatch:
    """Rows or packs that are computed at once, as tensors (rows or packs, tokens) on a device, and where their trained
    tokens are. `tensors` have the arguments of the loss by name, of flat packs numbers too."""

    packs: list[Pack]
    tensors: dict[str, Any]
    trained: TrainedTokens

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device. To a GPU it goes from pinned memory, while the GPU computes: nobody waits for it."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, torch.Tensor)}
        trained = self.trained
        if pins := device.type == "cuda":
            tensors, trained = {name: tensor.pin_memory() for name, tensor in tensors.items()}, trained.pin_memory()
        moved = {name: tensor.to(device, non_blocking=pins) for name, tensor in tensors.items()}
        return MicroBatch(self.packs, self.tensors | moved, trained.to(device, non_blocking=pins))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for pack in self.packs for row in pack]


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a step are laid out in tensors."""

    pad_token_id: int
    longest: int  # tokens of the run's longest row: the most of a pack, and the room that a micro-batch has for each
    packs: bool = False
    flat: bool = False  # packs go end to end in one row, as variable-length attention takes them

    def pack(self, rows: Sequence[dict[str, Any]]) -> list[Pack]:
        """The rows of a step one by one, or in packs."""
        if not self.packs:
            return [[row] for row in rows]
        packs = first_fit_decreasing([len(row["input_ids"]) for row in rows], self.longest)
        return [[rows[index] for index in pack] for pack in packs]

    def cut(self, packs: Sequence[Pack], micro_batch: int) -> list[list[Pack]]:
        """The micro-batches of a step: none takes more room than `micro_batch` of the run's longest rows."""
        parts = cut_micro_batches([length_of(pack) for pack in packs], micro_batch * self.longest, self.flat)
        return [list(packs[part]) for part in parts]

    def first_full(self, packs: Sequence[Pack], micro_batch: int) -> list[Pack]:
        """The first packs, as many as a micro-batch has room for."""
        lengths = [length_of(pack) for pack in packs]
        return list(packs[fill_micro_batches(lengths, micro_batch * self.longest, self.flat)[0]])

    def room_of(self, packs: Sequence[Pack]) -> int:
        """How many of the run's longest rows take the room of these packs."""
        return max(1, -(-padded_tokens([length_of(pack) for pack in packs], self.flat) // self.longest))

    def collate(self, packs: Sequence[Pack]) -> MicroBatch:
        """One micro-batch, in main memory."""
        if self.packs:
            tensors = collate_packed(packs, self.pad_token_id, self.flat)
        else:
            tensors = collate([row for pack in packs for row in pack], self.pad_token_id)
        trained = find_trained_tokens(tensors["input_ids"], tensors.get("attention_mask"), tensors["labels"])
        return MicroBatch(list(packs), tensors, trained)
