"""Near-duplicates are found, kept on one side of a split, and cost no more where all rows are alike."""

import time

import numpy as np
import pytest
from prose import prose

from lorakit.data.conversations import Conversation
from lorakit.data.hygiene import near
from lorakit.data.hygiene.traits import traits


def signatures(*texts: str) -> np.ndarray:
    return near.signatures(texts)


def one_word_changed(text: str, at: int = 7) -> str:
    words = text.split()
    words[at] = "elsewhere"
    return " ".join(words)


def test_signatures_are_those_of_datasketch():
    from datasketch import MinHash

    for text in (prose(1), prose(2, 400), "two words", "中文没有空格的一段文字", "", "{}"):
        theirs = MinHash(num_perm=near.SIZE, hashfunc=int)
        theirs.update_batch(near.shingles(text).tolist())
        assert np.array_equal(near.signatures([text])[0], (theirs.hashvalues & 0xFFFF).astype(np.uint16))


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
    assert near.groups(signatures(prose(9), one, prose(10), other)).tolist() == [0, 1, 2, 1]


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
    assert near.groups(signatures(one, other)).tolist() == [0, 1]


def test_a_shared_system_prompt_makes_no_near_duplicates():
    system = {"role": "system", "content": prose(1000, 500)}
    rows = [[system, {"role": "user", "content": prose(i)}, {"role": "assistant", "content": "Yes"}] for i in range(20)]
    made = traits([Conversation(row) for row in rows], near=True)
    assert near.groups(made.signature).tolist() == list(range(20))


def planted(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random signatures where every fifth row nearly repeats an earlier one (56 of 64 values), and which."""
    dice = np.random.default_rng(seed)
    made = dice.integers(0, 65536, (count, near.SIZE), dtype=np.uint16)
    origin = np.arange(count)
    for row in range(5, count, 5):
        origin[row] = dice.integers(0, row // 5) * 5 + dice.integers(1, 5)
        made[row] = made[origin[row]]
        made[row, dice.choice(near.SIZE, 8, replace=False)] ^= 1
    return made, origin


def test_each_row_of_a_group_resembles_the_first_of_it():
    made, origin = planted(3000)
    group = near.groups(made)
    found = group != np.arange(3000)
    assert (group[found] == origin[found]).all()
    assert found[origin != np.arange(3000)].mean() > 0.99


def test_rows_appended_behind_change_nothing_before_them():
    made, _ = planted(1500)
    own = np.random.default_rng(1).random(1500) < 0.2
    group, side = near.groups(made), near.sides(made, own)
    for count in (1, 2, 7, 400, 1499):
        assert np.array_equal(near.groups(made[:count]), group[:count])
        assert np.array_equal(near.sides(made[:count], own[:count]), side[:count])


def test_near_duplicates_stay_on_the_side_of_the_earliest():
    made, origin = planted(3000)
    own = np.random.default_rng(1).random(3000) < 0.2
    side = near.sides(made, own)
    met = near.groups(made) == origin
    assert (side[met] == side[origin[met]]).all()
    alone = ~np.isin(np.arange(3000), origin[origin != np.arange(3000)]) & (origin == np.arange(3000))
    assert (side[alone] == own[alone]).all()
    assert near.leaks(made[side == 0], made[side == 1])[0].size <= 1


def test_a_row_that_resembles_both_sides_goes_to_neither():
    one = np.random.default_rng(0).integers(0, 65536, near.SIZE, dtype=np.uint16)
    left, right = one.copy(), one.copy()
    left[np.arange(0, 20, 2)] ^= 1
    right[np.arange(1, 21, 2)] ^= 1  # 44 of 64 alike: left and right are no near-duplicates, both are of `one`
    made = np.stack([left, right, one, one])
    assert near.sides(made, np.array([True, False, True, False])).tolist() == [1, 0, -1, -1]
    assert near.sides(made, np.array([False, False, True, True])).tolist() == [0, 0, 0, 0]


def test_leaks_name_the_held_out_row():
    texts = [prose(i, 80) for i in range(30)]
    held_out = [prose(100, 80), one_word_changed(texts[7]), texts[20].upper()]
    rows, theirs = near.leaks(near.signatures(texts), near.signatures(held_out))
    assert (rows.tolist(), theirs.tolist()) == ([7, 20], [1, 2])
    assert near.leaks(near.signatures(texts), near.signatures([]))[0].size == 0


@pytest.mark.parametrize("alike", [0.7, 1.0])
def test_a_hundred_thousand_rows_of_one_template_take_seconds(alike):
    dice = np.random.default_rng(0)
    made = dice.integers(0, 65536, (100_000, near.SIZE), dtype=np.uint16)
    made = np.where(dice.random(made.shape) < alike, made[0], made)
    start = time.perf_counter()
    near.groups(made)
    near.sides(made, dice.random(len(made)) < 0.1)
    near.leaks(made[:90_000], made[90_000:])
    assert time.perf_counter() - start < 30  # some 4 s; quadratic work would take hours


def test_rows_of_one_template_are_split_like_any_others():
    boilerplate = prose(3, 60)
    made = signatures(*(f"{boilerplate} {prose(100 + number, 3)}" for number in range(600)))
    assert len(set(near.groups(made).tolist())) < 100, "the rows of this test must be near-duplicates"
    own = np.random.default_rng(0).random(600) < 0.2
    found = near.sides(made, own)
    assert (found >= 0).all()
    assert 0.1 < found.mean() < 0.3 and (found[30:] == own[30:]).mean() > 0.95


def test_twenty_copies_of_every_row_stay_together_even_side_by_side():
    texts = [one_word_changed(prose(row, 150), at) for row in range(40) for at in range(20)]
    found = near.sides(signatures(*texts), np.random.default_rng(0).random(800) < 0.3).reshape(40, 20)
    assert (found == found[:, :1]).all() and 0 < found.mean() < 1
