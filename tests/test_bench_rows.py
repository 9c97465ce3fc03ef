"""tools/bench_rows.py: the rows that lorakit is timed on are what the documents say of them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOKENS, COUNT = (200, 500), 24


@pytest.fixture
def rows(monkeypatch, tokenizer):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from bench_rows import free_rows

    return [json.loads(line)["messages"] for line in free_rows(COUNT, TOKENS, tokenizer)]


def test_rows_of_free_text_have_the_lengths_that_are_said(rows, tokenizer):
    whole = [len(tokenizer.apply_chat_template(row, tokenize=True, return_dict=True)["input_ids"]) for row in rows]
    assert all(TOKENS[0] - 4 <= length <= TOKENS[1] + 4 for length in whole)
    assert len(set(whole)) > COUNT / 2  # spread over the range
    answers = [len(tokenizer(row[-1]["content"], add_special_tokens=False)["input_ids"]) for row in rows]
    assert sum(answers) / sum(whole) == pytest.approx(0.5, abs=0.05)


def test_no_two_rows_of_free_text_begin_alike(rows):
    beginnings = sorted(row[0]["content"] for row in rows)
    assert all(one[:30] != other[:30] for one, other in pairwise(beginnings))
    assert all([message["role"] for message in row] == ["system", "user", "assistant"] for row in rows)
