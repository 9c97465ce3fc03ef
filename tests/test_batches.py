"""Batches depend on the rows, the seed and the epoch, never on how they are split."""

import time
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch

from lorakit.data.batches import collate, draws, epoch_batches, split_batch
from lorakit.data.micro_batches import cut_micro_batches, fill_micro_batches, padded_tokens
from lorakit.data.mixture import Mixture
from lorakit.errors import UserError
from lorakit.train.arguments import StepBatchSampler
from lorakit.train.batch_layout import BatchLayout, count_trained_tokens

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
    sampler = StepBatchSampler(LENGTHS[:rows], batch, seed=1, mixture=Mixture((rows,), (1.0,)))
    assert list(sampler) == epoch_batches(LENGTHS[:rows], batch, 1, 0)
    assert len(sampler) == len(list(sampler)) == -(-rows // batch)


def made_rows(*lengths):
    return [{"input_ids": [5] * n, "labels": [-100] + [5] * (n - 1), "where": f"row {n}"} for n in lengths]


def test_a_micro_batch_is_rows_or_packs_and_knows_where_they_come_from():
    rows = made_rows(6, 4, 3, 3)
    alone, packing = BatchLayout(pad_token_id=0, longest=6), BatchLayout(pad_token_id=0, longest=7, packs=True)
    assert [len(pack) for pack in alone.pack(rows)] == [1, 1, 1, 1]
    first = alone.collate(alone.pack(rows)[:2])
    assert first.tensors["input_ids"].shape == (2, 6) and [row["where"] for row in first.rows] == ["row 6", "row 4"]
    packs = packing.pack(rows)
    assert [[len(row["input_ids"]) for row in pack] for pack in packs] == [[6], [4, 3], [3]]
    packed = packing.collate(packs[:2])
    assert packed.tensors["input_ids"].shape == (2, 7)
    assert [row["where"] for row in packed.rows] == ["row 6", "row 4", "row 3"]


@pytest.mark.parametrize("end_to_end", [False, True])
def test_micro_batches_are_the_fewest_that_the_room_allows_and_as_even_as_they_can_be(end_to_end):
    generator = Random(3)
    for _ in range(200):
        lengths = sorted((generator.randint(1, 90) for _ in range(generator.randint(1, 30))), reverse=True)
        budget = generator.randint(20, 400)
        parts = cut_micro_batches(lengths, budget, end_to_end)
        assert [at for part in parts for at in range(part.start, part.stop)] == list(range(len(lengths)))
        taken = [padded_tokens(lengths[part], end_to_end) for part in parts]
        assert all(tokens <= budget or part.stop - part.start == 1 for part, tokens in zip(parts, taken, strict=True))
        full = fill_micro_batches(lengths, budget, end_to_end)
        assert len(parts) == len(full)
        assert max(taken) <= max(padded_tokens(lengths[part], end_to_end) for part in full)
    assert cut_micro_batches([10] * 16, 90) == [slice(0, 8), slice(8, 16)]
    assert cut_micro_batches([40, 20, 10, 10, 10, 10], 40) == [slice(0, 1), slice(1, 3), slice(3, 6)]


def test_trained_tokens_are_those_that_the_laid_out_rows_train():
    rows = [{**row, "labels": row["input_ids"]} for row in made_rows(6, 4, 1)]  # a first token has nothing before it
    for layout in (BatchLayout(pad_token_id=0, longest=6), BatchLayout(pad_token_id=0, longest=7, packs=True)):
        labels = layout.collate(layout.pack(rows)).tensors["labels"]
        assert count_trained_tokens(rows) == int((labels[:, 1:] != -100).sum()) == 8


def test_collate_pads_to_the_right_and_trains_no_padding():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_split_batch_keeps_the_order():
    assert split_batch([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


MIXTURE = Mixture((100, 20, 30), (1.0, 2.5, 0.25))


def rows_drawn(epoch, mixture, lengths=LENGTHS):
    return [row for batch in epoch_batches(lengths, 8, 1, epoch, mixture) for row in batch]


def test_weights_say_how_often_a_row_is_drawn_and_every_row_has_its_turn():
    seen = []
    for epoch in range(4):
        drawn = rows_drawn(epoch, MIXTURE)
        assert len(drawn) == sum(MIXTURE.drawn_in(epoch)) == 100 + 50 + (8 if epoch % 2 == 0 else 7)
        assert [drawn.count(row) for row in range(100)] == [1] * 100
        assert sorted({drawn.count(row) for row in range(100, 120)}) == [2, 3]
        seen += [row for row in drawn if row >= 120]
    assert sorted(seen) == list(range(120, 150))
    assert epoch_batches(LENGTHS, 8, 1, 0, MIXTURE) == epoch_batches(LENGTHS, 8, 1, 0, MIXTURE)


@pytest.mark.parametrize("weight", [0.1, 0.07, 1 / 3, 0.5, 0.999, 1.01, 1.5, 3.14159])
@pytest.mark.parametrize("rows", [1, 4, 7, 50])
def test_over_the_epochs_each_row_of_a_small_source_is_drawn_equally_often(rows, weight):
    mixture = Mixture((20, rows), (1.0, weight))
    counts = Counter()
    for epoch in range(41):
        drawn = Counter(row - 20 for row in rows_drawn(epoch, mixture, LENGTHS[: 20 + rows]) if row >= 20)
        assert drawn.total() == mixture.drawn_in(epoch)[1]
        counts += drawn
        assert counts.total() == int((epoch + 1) * weight * rows + 0.5)
        every = [counts[row] for row in range(rows)]
        assert max(every) - min(every) <= 1


def test_sources_of_the_same_weight_are_each_drawn_as_often_as_they_say():
    mixture = Mixture((20, 4, 4), (1.0, 0.1, 0.1))
    assert mixture.drawn_by(10) == [200, 4, 4]


def test_the_sampler_counts_weighted_steps():
    sampler = StepBatchSampler(LENGTHS, 8, 1, Mixture((150,), (1.5,)))
    assert len(list(sampler)) == len(sampler) == 29


@pytest.mark.parametrize("mixture", [MIXTURE, Mixture((140, 4, 6), (0.013, 0.1, 0.2)), Mixture((150,), (1.0,))])
def test_the_steps_of_a_run_are_the_epochs_one_behind_the_other_however_they_are_counted(mixture):
    """Trainer's epochs are all as long as the first; the data's are not. Resuming starts at any of Trainer's."""
    every = [batch for epoch in range(60) for batch in epoch_batches(LENGTHS, 8, 1, epoch, mixture)]
    sampler, steps = StepBatchSampler(LENGTHS, 8, 1, mixture), []
    while len(steps) < 25:
        sampler.set_epoch(len(steps) // len(sampler))
        steps += list(sampler)
    assert steps == every[: len(steps)]
    assert mixture.run_steps(8, 60, None) == len(every)
    told = draws(LENGTHS, 8, 1, mixture, 25)
    drawn = Counter(row for batch in every[:25] for row in batch)
    starts = np.cumsum([0, *mixture.counts])
    assert [sum(epoch[source] for epoch in told) for source in range(len(mixture.counts))] == [
        sum(drawn[row] for row in range(starts[source], starts[source + 1])) for source in range(len(mixture.counts))
    ]


def test_the_draws_of_a_single_source_are_its_steps():
    alone = Mixture((150,), (0.5,))
    assert draws(LENGTHS, 8, 1, alone, 14) == [[75], [32]]  # ten batches, the last of three rows, and four more


def test_a_million_rows_are_drawn_in_little_time():
    lengths, mixture = [10] * 1_000_000, Mixture((500_000, 500_000), (1.0, 0.37))
    start = time.process_time()
    weighted = epoch_batches(lengths, 16, 1, 5, mixture)
    middle = time.process_time()
    epoch_batches(lengths, 16, 1, 5)
    assert sum(map(len, weighted)) == 685_000
    assert middle - start < 2 * (time.process_time() - middle)


def test_weights_beyond_all_measure_are_refused():
    with pytest.raises(UserError, match=r"draws 0\.04 rows, less than one"):
        Mixture((4,), (0.01,)).refuse_extremes()
    with pytest.raises(UserError, match="more than"):
        Mixture((4,), (1e12,)).refuse_extremes()
