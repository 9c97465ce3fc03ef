"""Every kind of file that asks something is read, and no other."""

import json
import re

import pytest

from lorakit.errors import UserError
from lorakit.evaluate.rating.sheet import Question, read_questions


def test_each_line_of_a_text_file_is_a_question(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("What is SSH?\n\n  And\u2028TLS? \r\n")
    assert read_questions(path) == [
        Question("1", [{"role": "user", "content": "What is SSH?"}]),
        Question("2", [{"role": "user", "content": "And\u2028TLS?"}]),
    ]


@pytest.mark.parametrize(
    ("row", "last", "reference"),
    [
        ({"question": "Why?", "answer": "So."}, "Why?", "So."),
        ({"question": "Why?"}, "Why?", None),
        ({"question": "Why?", "context": "A text."}, "A text.\n\nWhy?", None),
        ({"prompt": "Why?", "completion": "So."}, "Why?", "So."),
        ({"prompt": "Why?"}, "Why?", None),
        ({"instruction": "Say why.", "input": "rain"}, "Say why.\n\nrain", None),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "Why?", None),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "So."},
                ]
            },
            "Why?",
            "So.",
        ),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, "Why?", "So."),
    ],
)
def test_a_row_is_a_question_with_or_without_its_answer(tmp_path, row, last, reference):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row | {"id": 7}) + "\n")
    (question,) = read_questions(path)
    assert (question.id, question.messages[-1]["content"], question.reference) == ("7", last, reference)
    assert question.messages[-1]["role"] == "user"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.txt", "\n \n", "q.txt: the file has no questions"),
        ("q.jsonl", "", "q.jsonl: the file has no questions"),
        ("q.jsonl", '{"question": "a"}\n{"question": 3}\n', "q.jsonl:2: the column 'question' is not a text"),
        ("q.jsonl", '{"question": "a"}\n{"quest', "q.jsonl:2: not valid JSON"),
        ("q.jsonl", '{"text": "a"}', "q.jsonl:1: the row has no question: none of the columns messages"),
        ("q.csv", "id,question\n1,a\n1,b\n", "q.csv:3: the id '1' is that of "),
        ("q.jsonl", '{"question": "a", "id": [1]}', "q.jsonl:1: the column 'id' is neither"),
        ("q.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "q.jsonl:1: the row has no question"),
        ("q.jsonl", '{"question": " "}', "q.jsonl:1: the row has no question"),
        ("q.pdf", "x", "rows are read from files"),
    ],
)
def test_a_file_that_asks_nothing_is_refused_with_its_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        read_questions(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / f"not-{name}".replace(".pdf", ".txt"))
