"""`format: auto`: what rows are told to be, why, and when lorakit refuses to guess."""

import pytest

from lorakit.data.formats import columns_read, detect
from lorakit.errors import UserError

USER = {"role": "user", "content": "a"}
TREE = {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a"}]}
PAIR = {"prompt": "a", "completion": "b"}


def refusal(*rows):
    with pytest.raises(UserError) as caught:
        detect(list(rows), "a.jsonl")
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "name", "why"),
    [
        ({"messages": [USER]}, "messages", "rows have 'messages'"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", "rows have 'conversations'"),
        ({"conversation": [USER]}, "sharegpt", "rows have 'conversation'"),
        (PAIR, "prompt-completion", "rows have 'prompt' and 'completion'"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": "b"}]}, "prompt-completion",
         "rows have 'prompt' and 'completion'"),
        ({"instruction": "a", "output": "b", "input": "", "system": "c", "id": 3}, "alpaca",
         "rows have 'instruction' and 'output'"),
        ({"question": "a", "answer": "b"}, "question-answer", "rows have 'question' and 'answer'"),
        ({"question": "a", "answers": {"text": ["b"]}, "context": "c"}, "question-answer",
         "rows have 'question' and 'answers'"),
        ({"text": "a"}, "text", "rows have 'text'"),
        ({"text": "a", "label": None}, "text", "rows have 'text'"),
        ({"text": "a", "label": "b"}, "classification", "rows have 'text' and 'label'"),
        ({"message_tree_id": "x", "tree_state": "ready_for_export", "prompt": TREE}, "oasst", "rows have 'prompt'"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens", "rows have 'input_ids'"),
        ({"messages": [USER], "prompt": None, "completion": None}, "messages", "rows have 'messages'"),
    ],
)  # fmt: skip
def test_the_format_is_told_from_the_columns_that_hold_something(row, name, why):
    assert detect([row], "a.jsonl") == (name, why)


def test_a_column_that_is_null_in_the_first_row_is_seen():
    assert detect([{"prompt": None, "completion": None}, PAIR], "a.jsonl")[0] == "prompt-completion"


def test_rows_that_fit_several_formats_equally_are_refused():
    error = refusal({**PAIR, "messages": [USER]})
    assert error == (
        "a.jsonl: the columns (completion, messages, prompt) fit several formats: messages, prompt-completion. "
        "Write one of them in data.format."
    )
    assert "fit several formats: messages, prompt-completion" in refusal(PAIR, {"messages": [USER]})
    assert "fit several formats: alpaca, text" in refusal({"instruction": "a", "output": "b", "text": "c"})


def test_a_format_that_can_read_no_row_does_not_compete():
    assert detect([{"text": "a", "conversation": "c-17"}], "a.jsonl")[0] == "text"
    assert detect([{"messages": 3, **PAIR}] * 5, "a.jsonl")[0] == "prompt-completion"
    assert "several formats" in refusal(*[{"messages": 3, **PAIR}] * 5, {"messages": [USER], **PAIR})


def test_labels_that_are_numbers_are_no_reason_to_train_the_text_alone():
    assert detect([{"text": "a", "label": 1}], "a.jsonl")[0] == "classification"


@pytest.mark.parametrize("rows", [[{"messages": [], "id": 3}], [{"messages": [{"role": "gpt", "content": "a"}]}] * 3])
def test_rows_of_one_format_that_are_all_wrong_are_of_that_format(rows):
    """Each of them says what is wrong with it, with its line."""
    assert detect(rows, "a.jsonl")[0] == "messages"


def test_rows_that_fit_no_format_are_told_what_is_known():
    error = refusal({"q": "a", "a": "b"})
    assert "a.jsonl: no format fits the columns (a, q)." in error
    assert "alpaca needs instruction, output" in error
    assert "question-answer needs question, answer or answers" in error
    assert "data.columns" in error
    assert "no format fits the columns (none)" in refusal({"q": None})


def test_a_prompt_alone_is_no_row():
    error = refusal({"prompt": "a"})
    assert "no format fits the columns (prompt). As oasst: the column 'prompt' is not a tree" in error


def test_single_messages_of_trees_are_not_taken_for_documents():
    row = {"message_id": "x", "parent_id": None, "text": "a", "role": "prompter", "lang": "en"}
    assert "each row is one message" in refusal(row)


def test_a_format_says_what_it_reads():
    assert columns_read("question-answer") == {"question", "answer", "answers", "context", "system"}
