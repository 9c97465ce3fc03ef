"""Packing: several rows end to end in one, each with positions of its own and blind to the others.

It saves padding. The rows of a step stay those of the step: packs are made within it, so that the result does not
depend on them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lorakit.data.conversations import IGNORED


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which rows go into which pack of at most `capacity` tokens: the longest first, each into the first with room.

    First-fit decreasing needs at most 11/9 of the fewest packs possible, and 6/9 of one more (Dosa, 2007).

    Raises:
        ValueError: a row is longer than `capacity`.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"a row of {lengths[order[0]]} tokens does not fit into packs of {capacity}")
    packs: list[list[int]] = []
    size = 1 << max(len(order) - 1, 0).bit_length()
    room = [capacity] * (2 * size)  # a tree: each node holds the most room in any pack below it
    for row in order:
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= lengths[row] else 2 * node + 1
        if node - size == len(packs):
            packs.append([])
        packs[node - size].append(row)
        room[node] -= lengths[row]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def collate_packed(
    packs: Sequence[Sequence[dict[str, Any]]], pad_token_id: int, flat: bool = False
) -> dict[str, torch.Tensor]:
    """Packs of rows as tensors (packs, tokens): input_ids, labels and position_ids.

    Every row's positions begin at 0, and so do those of the padding behind the last one: from that the attention of
    transformers knows what belongs together. No row's first token is trained, since nothing of its own stands before
    it. `flat`: all packs behind each other in one, without padding, as variable-length attention takes them.
    """
    if flat:
        packs = [[row for pack in packs for row in pack]]
    width = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
    ids = torch.full((len(packs), width), pad_token_id, dtype=torch.long)
    labels = torch.full((len(packs), width), IGNORED, dtype=torch.long)
    positions = torch.zeros((len(packs), width), dtype=torch.long)
    for index, pack in enumerate(packs):
        at = 0
        for row in pack:
            length = len(row["input_ids"])
            ids[index, at : at + length] = torch.as_tensor(row["input_ids"])
            labels[index, at : at + length] = torch.as_tensor(row["labels"])
            labels[index, at] = IGNORED
            positions[index, at : at + length] = torch.arange(length)
            at += length
        positions[index, at:] = torch.arange(width - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}
