"""`columns`: rows whose columns have other names than ours."""

import json

import pytest

from lorakit.data.sources import open_source, rename_columns
from lorakit.errors import UserError
from lorakit.recipe.schema import Source


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def open_rows(rows, format="auto", columns=None):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        source = Source(path=str(path), format=format, columns=columns or {})
        opened = open_source(source)
        records = [row.record for block in opened.blocks for row in block.rows()]
        opened.count_block(opened.files[0], len(records), {column for record in records for column in record}, set())
        opened.check_all_rows()
        return opened.format, opened.why, [rename_columns(record, source.columns) for record in records]

    return open_rows


def refusal(opened, *arguments, **options):
    with pytest.raises(UserError) as caught:
        opened(*arguments, **options)
    return str(caught.value)


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
