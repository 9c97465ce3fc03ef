"""Near-duplicates are found, kept on one side of a split, and cost no more where all rows are alike."""

import time

import numpy as np
import pytest
from prose import prose

from lorakit.data.cleaning import minhash
from lorakit.data.cleaning.row_stats import compute_row_stats
from lorakit.data.rows import Conversation


def signatures(*texts: str) -> np.ndarray:
    return minhash.signatures(texts)


def one_word_changed(text: str, at: int = 7) -> str:
    words = text.split()
    words[at] = "elsewhere"
    return " ".join(words)


def test_signatures_are_those_of_datasketch():
    from datasketch import MinHash

    for text in (prose(1), prose(2, 400), "two words", "中文没有空格的一段文字", "", "{}"):
        theirs = MinHash(num_perm=minhash.SIZE, hashfunc=int)
        theirs.update_batch(minhash.shingles(text).tolist())
        assert np.array_equal(minhash.signatures([text])[0], (theirs.hashvalues & 0xFFFF).astype(np.uint16))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (prose(1, 80), one_word_changed(prose(1, 80))),
        (prose(1), prose(1).upper().replace(" ", ",  ") + "!"),
        ("What is the capital of France? Paris.", "what's the capital of france?  Paris".replace("what's", "What is")),
        ("这是一个没有空格的句子，用来测试近似重复的检查。", "这是一个没有空格的句子，用来测试近似重复的检查！"),
        ("Yes", "yes."),
    ],
)  # fmt: skip
def test_rows_that_hardly_differ_are_near_duplicates(one, other):
    assert minhash.group_near_duplicates(signatures(prose(9), one, prose(10), other)).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (prose(1), prose(2)),
        ("What is 3 + 4? 7", "What is 5 + 4? 9"),
        ("What is the capital of France? Paris.", "What is the capital of Italy? Rome."),
        ("这是一个没有空格的句子，用来测试检查。", "今天天气很好，我们一起去公园散步吧。"),
        ("{}", "[]"),
        ("Yes", "No"),
    ],
)
def test_rows_that_say_something_else_are_not(one, other):
    assert minhash.group_near_duplicates(signatures(one, other)).tolist() == [0, 1]


def test_a_shared_system_prompt_makes_no_near_duplicates():
    system = {"role": "system", "content": prose(1000, 500)}
    rows = [[system, {"role": "user", "content": prose(i)}, {"role": "assistant", "content": "Yes"}] for i in range(20)]
    made = compute_row_stats([Conversation(row) for row in rows], near=True)
    assert minhash.group_near_duplicates(made.signature).tolist() == list(range(20))


def planted(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random signatures where every fifth row nearly repeats an earlier one (56 of 64 values), and which."""
    dice = np.random.default_rng(seed)
    made = dice.integers(0, 65536, (count, minhash.SIZE), dtype=np.uint16)
    origin = np.arange(count)
    for row in range(5, count, 5):
        origin[row] = dice.integers(0, row // 5) * 5 + dice.integers(1, 5)
        made[row] = made[origin[row]]
        made[row, dice.choice(minhash.SIZE, 8, replace=False)] ^= 1
    return made, origin


def test_each_row_of_a_group_resembles_the_first_of_it():
    made, origin = planted(3000)
    group = minhash.group_near_duplicates(made)
    found = group != np.arange(3000)
    assert (group[found] == origin[found]).all()
    assert found[origin != np.arange(3000)].mean() > 0.99


def test_rows_appended_behind_change_nothing_before_them():
    made, _ = planted(1500)
    own = np.random.default_rng(1).random(1500) < 0.2
    group, side = minhash.group_near_duplicates(made), minhash.split_sides(made, own)
    for count in (1, 2, 7, 400, 1499):
        assert np.array_equal(minhash.group_near_duplicates(made[:count]), group[:count])
        assert np.array_equal(minhash.split_sides(made[:count], own[:count]), side[:count])


def test_near_duplicates_stay_on_the_side_of_the_earliest():
    made, origin = planted(3000)
    own = np.random.default_rng(1).random(3000) < 0.2
    side = minhash.split_sides(made, own)
    met = minhash.group_near_duplicates(made) == origin
    assert (side[met] == side[origin[met]]).all()
    alone = ~np.isin(np.arange(3000), origin[origin != np.arange(3000)]) & (origin == np.arange(3000))
    assert (side[alone] == own[alone]).all()
    assert minhash.find_leaks(made[side == 0], made[side == 1])[0].size <= 1


def test_a_row_that_resembles_both_sides_goes_to_neither():
    one = np.random.default_rng(0).integers(0, 65536, minhash.SIZE, dtype=np.uint16)
    left, right = one.copy(), one.copy()
    left[np.arange(0, 20, 2)] ^= 1
    right[np.arange(1, 21, 2)] ^= 1  # 44 of 64 alike: left and right are no near-duplicates, both are of `one`
    made = np.stack([left, right, one, one])
    assert minhash.split_sides(made, np.array([True, False, True, False])).tolist() == [1, 0, -1, -1]
    assert minhash.split_sides(made, np.array([False, False, True, True])).tolist() == [0, 0, 0, 0]


def test_leaks_name_the_held_out_row():
    texts = [prose(i, 80) for i in range(30)]
    held_out = [prose(100, 80), one_word_changed(texts[7]), texts[20].upper()]
    rows, theirs = minhash.find_leaks(minhash.signatures(texts), minhash.signatures(held_out))
    assert (rows.tolist(), theirs.tolist()) == ([7, 20], [1, 2])
    assert minhash.find_leaks(minhash.signatures(texts), minhash.signatures([]))[0].size == 0


@pytest.mark.parametrize("alike", [pytest.param(0.7, marks=pytest.mark.slow), 1.0])
def test_a_hundred_thousand_rows_of_one_template_take_seconds(alike):
    dice = np.random.default_rng(0)
    made = dice.integers(0, 65536, (100_000, minhash.SIZE), dtype=np.uint16)
    made = np.where(dice.random(made.shape) < alike, made[0], made)
    start = time.perf_counter()
    minhash.group_near_duplicates(made)
    minhash.split_sides(made, dice.random(len(made)) < 0.1)
    minhash.find_leaks(made[:90_000], made[90_000:])
    assert time.perf_counter() - start < 30  # some 4 s; quadratic work would take hours


def test_rows_of_one_template_are_split_like_any_others():
    boilerplate = prose(3, 60)
    made = signatures(*(f"{boilerplate} {prose(100 + number, 3)}" for number in range(600)))
    assert len(set(minhash.group_near_duplicates(made).tolist())) < 100, "the rows of this test must be near-duplicates"
    own = np.random.default_rng(0).random(600) < 0.2
    found = minhash.split_sides(made, own)
    assert (found >= 0).all()
    assert 0.1 < found.mean() < 0.3 and (found[30:] == own[30:]).mean() > 0.95


def test_twenty_copies_of_every_row_stay_together_even_side_by_side():
    texts = [one_word_changed(prose(row, 150), at) for row in range(40) for at in range(20)]
    found = minhash.split_sides(signatures(*texts), np.random.default_rng(0).random(800) < 0.3).reshape(40, 20)
    assert (found == found[:, :1]).all() and 0 < found.mean() < 1
