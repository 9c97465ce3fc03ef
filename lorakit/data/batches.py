"""Batches: which rows each optimizer step trains, and how rows of several lengths become one tensor, padded or packed.
The order depends on the rows, the seed, the epoch and the effective batch size alone, never on how a batch is split: so
the result does not depend on the machine. Packing puts rows end to end in one, each with positions of its own and blind
to the others; packs are made within the rows of a step."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lorakit.data.mixture import Mixture
from lorakit.data.rows import IGNORED

Row = TypeVar("Row")

_POOL = 32  # batches sorted together by length: enough to save most padding, few enough to vary


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, mixture: Mixture | None = None
) -> list[list[int]]:
    """The rows of every optimizer step of one epoch, longest first within a step: shuffled, sorted by length within
    pools of 32 batches, cut into batches whose order is shuffled again; the rows left over come last. `mixture`: the
    sources, whose rows stand one source behind the other in `lengths`; None draws every row once."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    if mixture is None or not mixture.is_weighted:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    else:
        drawn = torch.from_numpy(_drawn(mixture, seed, epoch))
        order = drawn[torch.randperm(len(drawn), generator=generator)].tolist()
    whole = len(order) - len(order) % batch_size
    order, rest = order[:whole], order[whole:]
    batches: list[list[int]] = []
    for start in range(0, whole, batch_size * _POOL):
        pool = sorted(order[start : start + batch_size * _POOL], key=lambda row: -lengths[row])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return [*batches, sorted(rest, key=lambda row: -lengths[row])] if rest else batches


def run_batches(
    lengths: Sequence[int], batch_size: int, seed: int, mixture: Mixture, step: int = 0
) -> Iterator[list[int]]:
    """The batches of a run from `step` on (the first is 0), epoch after epoch without end."""
    for epoch in count():
        steps = mixture.steps_in(epoch, batch_size)
        if step < steps:
            yield from epoch_batches(lengths, batch_size, seed, epoch, mixture)[step:]
        step = max(step - steps, 0)


def draws(lengths: Sequence[int], batch_size: int, seed: int, mixture: Mixture, steps: int) -> list[list[int]]:
    """How many rows of each source every epoch of a run of `steps` draws; of the last, those that the steps reach."""
    counts: list[list[int]] = []
    starts = np.cumsum([0, *mixture.counts])
    while steps > 0:
        epoch = len(counts)
        size = mixture.steps_in(epoch, batch_size)
        if size <= steps:
            counts.append(mixture.drawn_in(epoch))
        elif len(mixture.counts) == 1:  # no order is needed to know it
            counts.append([steps * batch_size])
        else:
            batches = epoch_batches(lengths, batch_size, seed, epoch, mixture)[:steps]
            counts.append(np.histogram([row for batch in batches for row in batch], starts)[0].tolist())
        steps -= size
    return counts


def _drawn(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, source by source. Each source is gone through in ever new orders, and an epoch goes on
    where the one before it stopped: no row is drawn twice more than another."""
    parts, first = [], 0
    before, after = mixture.drawn_by(epoch), mixture.drawn_by(epoch + 1)
    for source, rows in enumerate(mixture.counts):
        at, end = before[source], after[source]
        while at < end:
            turn, start = divmod(at, rows)
            stop = min(rows, start + end - at)
            if stop - start == rows:  # all of them, whose order does not matter
                part = np.arange(rows)
            else:
                part = np.random.default_rng([seed, source, turn]).permutation(rows)[start:stop]
            parts.append(first + part)
            at += stop - start
        first += rows
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def split_batch(rows: Sequence[Row], micro_batch: int) -> list[list[Row]]:
    """The micro-batches of one optimizer step."""
    return [list(rows[at : at + micro_batch]) for at in range(0, len(rows), micro_batch)]


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of input_ids and labels as right-padded tensors (rows, tokens) with their attention mask."""
    ids, labels = ([torch.as_tensor(row[name], dtype=torch.long) for row in rows] for name in ("input_ids", "labels"))
    mask = [torch.ones_like(row) for row in ids]
    padded = zip(
        ("input_ids", "labels", "attention_mask"), (ids, labels, mask), (pad_token_id, IGNORED, 0), strict=True
    )
    return {name: pad_sequence(rows, batch_first=True, padding_value=value) for name, rows, value in padded}


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which rows go into which pack of at most `capacity` tokens: the longest first, each into the first with room (at
    most 11/9 of the fewest packs and 6/9 of one, Dosa 2007); a ValueError where one is longer."""
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


def collate_packed(packs: Sequence[Sequence[dict[str, Any]]], pad_token_id: int, flat: bool = False) -> dict[str, Any]:
    """Packs of rows as tensors (packs, tokens): input_ids, labels and position_ids. The positions of every row, and of
    the padding behind the last, begin at 0: so the attention of transformers knows what belongs together. No row's
    first token is trained: nothing of its own stands before it. `flat`: all packs in one, as variable-length attention
    takes them, and where its rows begin and how long the longest is, by transformers' names (FlashAttentionKwargs)."""
    if flat:
        packs = [[row for pack in packs for row in pack]]
    width = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
    joined = []
    for pack in packs:
        ids = list(chain.from_iterable(row["input_ids"] for row in pack))
        labels = list(chain.from_iterable([IGNORED, *row["labels"][1:]] for row in pack))
        joined.append({"input_ids": ids, "labels": labels})
    lengths = [[len(row["input_ids"]) for row in pack] for pack in packs]
    positions = [torch.cat([torch.arange(length) for length in (*row, width - sum(row))]) for row in lengths]
    batch = collate(joined, pad_token_id)
    packed = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": torch.stack(positions)}
    if not flat:
        return packed
    starts = torch.tensor([0, *accumulate(lengths[0])], dtype=torch.int32)
    longest = max(lengths[0])
    return packed | {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
