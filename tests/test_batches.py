"""Batches depend on the rows, the seed and the epoch, never on how they are split."""

import numpy as np
import pytest
import torch

from lorakit.data.batches import collate, draws, epoch_batches, split_batch
from lorakit.train.trainer import Plan, StepBatches

LENGTHS = [(7 * i) % 53 + 3 for i in range(150)]


@pytest.mark.parametrize("batch_size", [1, 4, 16, 149, 150, 200])
def test_an_epoch_is_every_row_once_in_full_batches_and_one_rest(batch_size):
    batches = epoch_batches(LENGTHS, batch_size, seed=1, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(150))
    assert all(len(batch) == batch_size for batch in batches[: 150 // batch_size])
    assert len(batches) == -(-150 // batch_size)


def test_order_changes_with_the_epoch_and_the_seed_and_nothing_else():
    assert epoch_batches(LENGTHS, 4, 1, 0) == epoch_batches(LENGTHS, 4, 1, 0)
    assert epoch_batches(LENGTHS, 4, 1, 0) != epoch_batches(LENGTHS, 4, 1, 1)
    assert epoch_batches(LENGTHS, 4, 1, 0) != epoch_batches(LENGTHS, 4, 2, 0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch_batches(LENGTHS, 4, 1, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_of_a_batch_are_of_like_length():
    def padding(batches):
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches) / sum(LENGTHS)

    arrival = [list(range(start, min(start + 8, 150))) for start in range(0, 150, 8)]
    assert padding(epoch_batches(LENGTHS, 8, 1, 0)) < 1.1 < 1.5 < padding(arrival)


@pytest.mark.parametrize(("rows", "batch", "micro"), [(22, 4, 3), (22, 4, 4), (5, 8, 3), (8, 8, 8), (9, 4, 1)])
def test_the_sampler_counts_its_micro_batches_as_the_trainer_needs_them(rows, batch, micro):
    plan = Plan(batch_size=batch, micro_batch=micro, seed=1, eval_steps=1, keep=1, pad_token_id=0)
    sampler = StepBatches(LENGTHS[:rows], plan)
    assert len(list(sampler)) == len(sampler)
    accumulation = -(-batch // micro)
    steps = len(sampler) // accumulation + (len(sampler) % accumulation > 0)
    assert steps == -(-rows // batch)


def test_collate_pads_to_the_right_and_trains_no_padding():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_split_batch_keeps_the_order():
    assert split_batch([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_weights_say_how_often_a_row_is_drawn_and_every_row_has_its_turn():
    weights = np.array([1.0] * 100 + [2.5] * 20 + [0.25] * 30)
    seen = []
    for epoch in range(4):
        batches = epoch_batches(LENGTHS, 8, 1, epoch, weights)
        drawn = [row for batch in batches for row in batch]
        assert len(drawn) == draws(150, weights) == 100 + 50 + 8
        assert [drawn.count(row) for row in range(100)] == [1] * 100
        assert sorted({drawn.count(row) for row in range(100, 120)}) == [2, 3]
        seen.append({row for row in drawn if row >= 120})
    assert seen[0] != seen[1]
    assert epoch_batches(LENGTHS, 8, 1, 0, weights) == epoch_batches(LENGTHS, 8, 1, 0, weights)


@pytest.mark.parametrize("packing", [False, True])
def test_the_sampler_counts_weighted_and_packed_steps(packing):
    plan = Plan(8, 3, 1, 1, 1, 0, packing=packing)
    weights = np.array([1.5] * 150)
    sampler = StepBatches(LENGTHS, plan, weights)
    assert len(list(sampler)) == len(sampler) == (29 if packing else 28 * 3 + 1)
