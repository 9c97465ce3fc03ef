"""Where the trained tokens of a micro-batch stand. It is found in main memory before the rows go to their device: a
pass that has to ask the device how many there are would wait for all that it still computes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100  # torch's ignore_index: the label of a token that is not trained


@dataclass(frozen=True)
class TrainedTokens:
    """`rows` and `columns` (trained tokens,): the place of the state that predicts each, which is one before it;
    `targets` (trained tokens,): their ids. `shared`: the leading tokens that are the same in all rows and stand before
    the first of these states."""

    rows: Tensor
    columns: Tensor
    targets: Tensor
    shared: int

    def __len__(self) -> int:
        return len(self.targets)

    def pin_memory(self) -> "TrainedTokens":
        """The same in memory from which a GPU copies by itself."""
        return replace(self, **{n: t.pin_memory() for n, t in vars(self).items() if isinstance(t, Tensor)})

    def to(self, device: torch.device, non_blocking: bool = False) -> "TrainedTokens":
        """The same on a device."""
        moved = {n: t.to(device, non_blocking=non_blocking) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def find_trained_tokens(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> TrainedTokens:
    """The trained tokens of right-padded or packed rows (rows, tokens); packed ones have no mask, and share nothing."""
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    shared = 0
    if attention_mask is not None:
        tokens = input_ids.shape[1]
        differing = _first_of((input_ids != input_ids[:1]) | (attention_mask == 0), tokens)
        shared = min(differing, _first_of(labels != IGNORED, tokens) - 1)
    return TrainedTokens(rows, columns, labels[rows, columns + 1], shared)


def _first_of(where: Tensor, otherwise: int) -> int:
    columns = where.any(0)
    return int(columns.int().argmax()) if bool(columns.any()) else otherwise
