"""How rows become conversations: formats, their detection, and columns under other names."""

import json

import pytest

from lorakit.data.formats import RowError
from lorakit.data.sources import open_source
from lorakit.errors import UserError
from lorakit.recipe.schema import Source
from lorakit.tables import FORMATS

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def open_rows(rows, format="auto", columns=None):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        name, why, found = open_source(Source(path=str(path), format=format, columns=columns or {}))
        return name, why, [row.record for row in found]

    return open_rows


def refusal(opened, *arguments, **options):
    with pytest.raises(UserError) as caught:
        opened(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "name", "why"),
    [
        ({"messages": [USER]}, "messages", "rows have 'messages'"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion", "rows have 'prompt' and 'completion'"),
        ({"instruction": "a", "output": "b"}, "alpaca", "rows have 'instruction' and 'output'"),
        ({"instruction": "a", "output": "b", "input": "", "system": "c"}, "alpaca",
         "rows have 'instruction' and 'output'"),
        ({"messages": [USER], "prompt": None, "completion": None}, "messages", "rows have 'messages'"),
        ({"prompt": "a", "completion": "b", "id": 1, "z": 2}, "prompt-completion",
         "rows have 'prompt' and 'completion'; not used: 'id', 'z'"),
    ],
)  # fmt: skip
def test_the_format_is_told_from_the_columns_that_hold_something(opened, row, name, why):
    assert opened([row])[:2] == (name, why)


def test_a_column_that_is_null_in_the_first_row_is_seen(opened):
    assert opened([{"prompt": None, "completion": None}, {"prompt": "a", "completion": "b"}])[0] == "prompt-completion"
    assert opened(["{", "3", {"messages": [USER]}])[0] == "messages"


def test_rows_that_fit_several_formats_are_refused(opened):
    both = {"prompt": "a", "completion": "b", "messages": [USER]}
    assert "fit several formats: messages, prompt-completion" in refusal(opened, [both])
    mixed = [{"prompt": "a", "completion": "b"}, {"messages": [USER]}]
    assert "a.jsonl: the columns (completion, messages, prompt) fit several formats" in refusal(opened, mixed)
    assert opened([both], format="messages")[:2] == ("messages", "as the recipe says; not used: 'completion', 'prompt'")


def test_rows_that_fit_no_format_are_told_what_is_known(opened):
    error = refusal(opened, [{"question": "a", "answer": "b"}])
    assert "no format fits the columns (answer, question)" in error
    assert "alpaca needs instruction, output" in error and "data.columns" in error


def test_columns_take_the_place_of_ours(opened):
    row = {"q": "a", "a": "b", "prompt": "not this"}
    name, why, records = opened([row], columns={"prompt": "q", "completion": "a"})
    assert (name, why) == ("prompt-completion", "rows have 'prompt' and 'completion'")
    assert records == [{"prompt": "a", "completion": "b"}]


def test_columns_may_change_places_or_be_used_twice(opened):
    row = {"prompt": "a", "completion": "b"}
    assert opened([row], columns={"prompt": "completion", "completion": "prompt"})[2] == [
        {"prompt": "b", "completion": "a"}
    ]
    assert opened([{"text": "a"}], columns={"prompt": "text", "completion": "text"})[2] == [
        {"prompt": "a", "completion": "a"}
    ]


def test_a_mapping_to_a_column_that_is_not_there_is_refused(opened):
    rows = [{"question": "a", "answer": "b"}]
    error = refusal(opened, rows, columns={"prompt": "qestion", "completion": "answer"})
    assert error == (
        "a.jsonl: data.columns takes 'prompt' from 'qestion', a column that no row has. Did you mean 'question'?"
    )
    assert "The columns are answer, question" in refusal(
        opened, rows, columns={"prompt": "zzz", "completion": "answer"}
    )


def test_an_optional_column_may_come_late_but_must_come(opened):
    rows = [{"instruction": "a", "output": "b"}] * 1500
    late = [*rows, {"instruction": "a", "output": "b", "context": "c"}]
    assert opened(late, columns={"input": "context"})[2][-1] == {"instruction": "a", "output": "b", "input": "c"}
    assert "takes 'input' from 'contxt'" in refusal(opened, late, columns={"input": "contxt"})


def test_a_field_that_the_format_does_not_read_is_refused(opened):
    error = refusal(opened, [{"prompt": "a", "completion": "b", "c": "d"}], columns={"context": "c"})
    assert (
        "fills 'context', which the format prompt-completion does not read. It reads completion, prompt, system"
        in error
    )


@pytest.mark.parametrize(
    ("name", "row", "conversation"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ("messages", {"messages": [{**USER, "name": None, "tool_calls": []}, ASSISTANT]}, [USER, ASSISTANT]),
        ("messages", {"messages": [USER], "system": "s"}, [{"role": "system", "content": "s"}, USER]),
        ("alpaca", {"instruction": "a", "output": "b"}, [USER, ASSISTANT]),
        ("alpaca", {"instruction": "a", "output": "b", "input": None, "system": ""}, [USER, ASSISTANT]),
        ("alpaca", {"instruction": "a", "output": "b", "input": "c"},
         [{"role": "user", "content": "a\n\nc"}, ASSISTANT]),
        ("prompt-completion", {"prompt": "a", "completion": "b"}, [USER, ASSISTANT]),
        ("prompt-completion", {"prompt": "", "completion": ""},
         [{**USER, "content": ""}, {**ASSISTANT, "content": ""}]),
        ("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT]),
    ],
)  # fmt: skip
def test_a_row_becomes_a_conversation(name, row, conversation):
    assert FORMATS[name].function(row) == conversation


@pytest.mark.parametrize(
    ("name", "row", "reason", "case"),
    [
        ("messages", {}, "the column 'messages' is missing or null", ""),
        ("messages", {"messages": []}, "the column 'messages' is an empty list", ""),
        ("messages", {"messages": "[]"}, "the column 'messages' is not a list of messages", "it is a text"),
        ("messages", {"messages": [USER, "b"]},
         "a message is not an object with role and content", "message 2 is a text"),
        ("messages", {"messages": [{"role": "user"}]},
         "a message has no text in 'content'", "message 1 (user) has null"),
        ("messages", {"messages": [{**USER, "content": ["a"]}]}, "a message has no text in 'content'",
         "message 1 (user) has a list"),
        ("messages", {"messages": [{"role": "gpt", "content": "a"}]},
         "a message has none of the roles system, user, assistant, tool", "message 1 has 'gpt'"),
        ("messages", {"messages": [{"content": "a"}]},
         "a message has none of the roles system, user, assistant, tool", "message 1 has None"),
        ("messages", {"messages": [USER, {**ASSISTANT, "weight": 0}]},
         "a message has parts that would not be trained on",
         "message 2 (assistant) has 'weight'"),
        ("messages", {"messages": [{"role": "system", "content": "s"}, USER], "system": "t"},
         "the row has a system prompt twice, in the column 'system' and as its first message", ""),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3},
         "the column 'input' is not a text", "it is a number"),
        ("alpaca", {"instruction": "a", "output": None}, "the column 'output' is missing or null", ""),
        ("prompt-completion", {"prompt": "a", "completion": [USER]},
         "the column 'completion' is not a text", "it is a list"),
        ("prompt-completion", {"prompt": [3], "completion": [USER]}, "a message is not an object with role and content",
         "message 1 is a number"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_says_why(name, row, reason, case):
    with pytest.raises(RowError) as caught:
        FORMATS[name].function(row)
    assert (caught.value.reason, caught.value.case) == (reason, case)
