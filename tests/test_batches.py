"""Batches depend on the rows, the seed and the epoch, never on how they are split."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lorakit.data.batches import collate, draws, epoch_batches, split_batch
from lorakit.train.steps import Plan, StepBatches, laid_out, trained_tokens, units_of

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


@pytest.mark.parametrize(("rows", "batch"), [(22, 4), (5, 8), (8, 8), (9, 4)])
def test_the_sampler_gives_a_step_at_a_time_and_counts_them(rows, batch):
    plan = Plan(batch_size=batch, micro_batch=3, seed=1, eval_steps=1, keep=1, pad_token_id=0, longest=60)
    sampler = StepBatches(LENGTHS[:rows], plan)
    assert list(sampler) == epoch_batches(LENGTHS[:rows], batch, 1, 0)
    assert len(sampler) == len(list(sampler)) == -(-rows // batch)


def made_rows(*lengths):
    return [{"input_ids": [5] * n, "labels": [-100] + [5] * (n - 1), "where": f"row {n}"} for n in lengths]


def test_a_micro_batch_is_rows_or_packs_and_knows_where_they_come_from():
    rows = made_rows(6, 4, 3, 3)
    alone = Plan(4, 2, seed=1, eval_steps=1, keep=1, pad_token_id=0, longest=7)
    assert [len(unit) for unit in units_of(rows, alone)] == [1, 1, 1, 1]
    first = laid_out(units_of(rows, alone)[:2], alone)
    assert first["input_ids"].shape == (2, 6) and first["where"] == ["row 6", "row 4"]
    packs = units_of(rows, replace(alone, packing=True))
    assert [[len(row["input_ids"]) for row in pack] for pack in packs] == [[6], [4, 3], [3]]
    packed = laid_out(packs[:2], replace(alone, packing=True))
    assert packed["input_ids"].shape == (2, 7) and packed["where"] == ["row 6", "row 4", "row 3"]


def test_trained_tokens_are_those_that_the_laid_out_rows_train():
    rows = [{**row, "labels": row["input_ids"]} for row in made_rows(6, 4, 1)]  # a first token has nothing before it
    plan = Plan(4, 3, seed=1, eval_steps=1, keep=1, pad_token_id=0, longest=7)
    for one in (plan, replace(plan, packing=True)):
        labels = laid_out(units_of(rows, one), one)["labels"]
        assert trained_tokens(rows) == int((labels[:, 1:] != -100).sum()) == 8


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


def test_the_sampler_counts_weighted_steps():
    sampler = StepBatches(LENGTHS, Plan(8, 3, 1, 1, 1, 0, 60), np.array([1.5] * 150))
    assert len(list(sampler)) == len(sampler) == 29
