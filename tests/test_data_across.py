"""Checks of a whole set find what was planted in it, and nothing in an honest set."""

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from prose import WORDS, prose

from lorakit.data.cleaning import dataset_checks
from lorakit.data.cleaning.row_stats import compute_row_stats, join_row_stats, languages
from lorakit.data.rows import Conversation, Text, Tokens


def qa(prompt: str, answer: str, system: str | None = None) -> Conversation:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages)


# Traits


def test_equal_rows_have_equal_traits_in_every_process_and_batch():
    code = (
        "from lorakit.data.rows import *; from lorakit.data.cleaning.row_stats import *; import hashlib;"
        "t = compute_row_stats(["
        "Conversation([{'role':'user','content':'Où?'},{'role':'assistant','content':'Là \\ud800.'}"
        "]), Text('one two three four five six seven'), Tokens([1,2],[-100,2])], near=True);"
        "print(t.content.tolist(), t.prompt.tolist(), t.answer.tolist(),"
        "hashlib.md5(t.signature.tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    rows = [qa(prose(i), prose(-i, i % 30)) for i in range(40)]
    whole = compute_row_stats(rows, near=True)
    batches = (rows[:1], rows[1:17], rows[17:])
    parts = join_row_stats([{**vars(compute_row_stats(some, near=True))} for some in batches])
    for one in ("content", "prompt", "answer", "style", "language", "script", "signature"):
        assert np.array_equal(getattr(whole, one), getattr(parts, one), equal_nan=one == "style"), one
    again = pickle.loads(pickle.dumps(whole))  # noqa: S301 - what a worker process does
    assert np.array_equal(again.content, whole.content)


def test_the_exact_hash_tells_apart_all_that_a_row_says():
    base = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        Conversation(base),
        Conversation([base[0], {**base[1], "content": "b "}]),
        Conversation([base[0], {**base[1], "thinking": "b"}]),
        Conversation([base[0], {**base[1], "train": False}]),
        Conversation(base[::-1]),
        Conversation(base, [{"type": "function"}]),
        Text("a"),
        Text("ab"),
        Tokens([1, 2], [1, 2]),
        Tokens([1, 2], [-100, 2]),
    ]
    said = compute_row_stats(rows, near=False).content
    assert len({tuple(one) for one in said.tolist()}) == len(rows)
    assert compute_row_stats(rows, near=False, style=False).style is None
    assert compute_row_stats([], near=True).signature.shape == (0, 64)


def test_prompts_and_answers_are_compared_without_case_and_white_space():
    made = compute_row_stats(
        [qa("What  is\nit?", "A Lamp"), qa("what is it?", "a lamp "), qa("what is it?", "b")], near=False
    )
    assert made.prompt[0] == made.prompt[1] == made.prompt[2] != 0
    assert made.answer[0] == made.answer[1] != made.answer[2]
    assert compute_row_stats([Text("a")], near=False).prompt[0] == 0


# Exact duplicates, contradictions, leakage


def test_exact_duplicates_name_the_first():
    rows = [qa("a", "b"), qa("a", "c"), qa("a", "b"), Text("x"), Text("x"), qa("a", "b")]
    assert dataset_checks.duplicates(compute_row_stats(rows, near=False).content).tolist() == [0, 1, 0, 3, 3, 0]
    assert dataset_checks.duplicates(np.empty((0, 2), np.uint64)).tolist() == []


def test_the_answer_that_most_rows_give_is_kept_and_a_tie_leaves_all_out():
    rows = [
        qa("one?", "a"), qa("two?", "a"), qa("one?", "A "), qa("one?", "b"), qa("two?", "b"), qa("three?", "c"),
        qa("three?", "C"), Text("a"), Text("b"), qa("one?", "c"), qa("one?", "x", system="Be brief."),
    ]  # fmt: skip
    made = compute_row_stats(rows, near=False)
    group, agrees = dataset_checks.contradictions(made.prompt, made.answer)
    assert group.tolist() == [0, 1, 0, 0, 1, -1, -1, -1, -1, 0, -1]
    assert np.flatnonzero(~agrees).tolist() == [1, 3, 4, 9]


def test_contradictions_agree_with_counting_by_hand():
    dice = np.random.default_rng(0)
    prompt, answer = dice.integers(0, 300, 1000, dtype=np.uint64), dice.integers(1, 4, 1000, dtype=np.uint64)
    group, agrees = dataset_checks.contradictions(prompt, answer)
    for row in range(1000):
        mine = np.flatnonzero(prompt == prompt[row])
        votes = sorted(((answer[mine] == one).sum() for one in np.unique(answer[mine])), reverse=True)
        if prompt[row] == 0 or len(votes) == 1:
            assert (group[row], agrees[row]) == (-1, True)
            continue
        wins = votes[0] > votes[1] and (answer[mine] == answer[row]).sum() == votes[0]
        assert (group[row], agrees[row]) == (mine[0], wins)


def test_leaks_are_rows_or_answers_that_are_held_out():
    held_out = compute_row_stats([qa("p", "a"), qa("q", "b", system="s"), Text("doc")], near=False)
    rows = [qa("x", "a"), qa("p", "a"), qa("P ", "A"), qa("p", "other"), Text("Doc"), Text("doc"), qa("q", "b")]
    found = dataset_checks.leaks(compute_row_stats(rows, near=False), held_out)
    assert [(one.row, one.held_out) for one in found] == [(1, 0), (2, 0), (5, 2)]
    assert found[0].reason != found[1].reason


# Style

ENGLISH = "The {0} and the {1} are near the {2}, which is what you would have with this {3} if they were not so far."
GERMAN = "Der Weg führt an der {0} vorbei und dann über die Brücke, die nicht weit von dem alten Bahnhof steht, {1}."
RUSSIAN = "Дорога ведёт мимо старого вокзала и дальше через мост, который стоит недалеко от реки, {0}."


def answers(*templates: str, count: int = 200) -> list[Conversation]:
    return [
        qa(f"Q{i}?", templates[i % len(templates)].format(*random.Random(i).choices(WORDS, k=4))) for i in range(count)
    ]


HONEST = {
    "one language": answers(ENGLISH),
    "two languages": answers(ENGLISH, GERMAN),
    "two scripts": answers(ENGLISH, RUSSIAN),
    "numbers": [qa(f"{i}?", str(i * 37)) for i in range(300)],
    "one word": [qa(f"{i}?", random.Random(i).choice(WORDS)) for i in range(300)],
    "yes and no": [qa(f"{i}?", "yes" if i % 3 else "No!") for i in range(100)],
    "JSON": [qa(f"{i}?", f'{{"name": "{WORDS[i % 40]}", "n": {i}, "tags": ["{WORDS[i % 7]}"]}}') for i in range(99)],
    "many lengths": [qa(f"{i}?", prose(i, 1 + i % 120)) for i in range(1000)],
    "short and long": [qa(f"{i}?", prose(i, 3 if i % 10 else 300)) for i in range(500)],
    "few": [*answers(ENGLISH, count=40), qa("?", prose(1, 3000))],
    "none with an answer": [Tokens([1, 2], [-100, 2]) for _ in range(80)],
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_set_has_no_outliers(name):
    assert dataset_checks.outliers(compute_row_stats(HONEST[name], near=False)) == {}


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (" ".join([ENGLISH] * 40), ["characters where 98 % have"]),
        ("No.", ["answer of 3 characters"]),
        (ENGLISH.upper(), ["upper case in 100% of the letters"]),
        (
            "lol dude you're gonna love this!!! omg haha that's the thing with a lamp, yeah and they don't!!",
            ["informal"],
        ),
        (GERMAN, ["language de where 99% are in en"]),
        (RUSSIAN, ["Cyrillic script where 99% are in Latin"]),
        ("0123 4567 8901 2345 6789 " * 4, ["digits"]),
        ("The and\n\n\n" * 10 + ENGLISH, ["line breaks"]),
    ],
)
def test_what_is_written_unlike_the_rest_is_found_with_its_reason(odd, words):
    rows = [*answers(ENGLISH), qa("Odd?", odd)]
    found = dataset_checks.outliers(compute_row_stats(rows, near=False))
    assert list(found) == [200]
    assert all(word in found[200] for word in words), found[200]


def test_the_length_of_an_outlier_is_named_beside_that_of_the_others():
    rows = [qa(f"{i}?", "x" * (20 + i % 71)) for i in range(400)] + [qa("?", "x" * 4120)]
    found = dataset_checks.outliers(compute_row_stats(rows, near=False))
    assert found == {400: "answer of 4,120 characters where 98 % have 20 to 90"}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (ENGLISH, "en"),
        (GERMAN, "de"),
        (RUSSIAN, "ru"),
        ("Le chien et le chat dorment dans la maison près du feu.", "fr"),
    ],
)
def test_a_language_is_told_by_a_sentence_and_not_by_a_word(text, code):
    made = compute_row_stats(
        [Text(text), Text(text[:9]), Text('{"a": [1, 2, {"b": "c"}], "d": [[], {}, ""], "e": 12345}')], near=False
    )
    assert languages()[made.language[0]] == code
    assert made.language[1:].tolist() == [-1, -1]
