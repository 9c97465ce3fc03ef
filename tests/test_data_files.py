"""Damaged and odd data files: an error that names the file and the line, or a counted drop; nothing else."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_families import FAMILIES

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.errors import UserError
from lorakit.progress import Silent
from lorakit.recipe.schema import Data

GOOD = '{"prompt": "Hi", "completion": "Paris"}'
TOKENIZER = FAMILIES["chatml"].tokenizer()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(path, **settings):
    return examples_of(Data(train=str(path), **settings), ChatTemplate(TOKENIZER), Silent())[0]


def file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, **settings):
    with pytest.raises(UserError) as caught:
        prepared(path, **settings)
    assert str(path.parent) not in str(caught.value)  # shown relative to the working directory
    return str(caught.value)


def answers(examples):
    return [TOKENIZER.decode([label for label in row["labels"] if label >= 0]) for row in examples.rows]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", f"{GOOD}\n{GOOD}\n", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", f"\ufeff{GOOD}\r\n\r\n  \t\n{GOOD}", ["a.jsonl:1", "a.jsonl:4"]),
        ("a.JSONL", GOOD, ["a.JSONL:1"]),
        ("a.json", f"\ufeff[{GOOD},\r\n\r\n{GOOD}]\n", ["a.json row 1", "a.json row 2"]),
        ("a.json", GOOD, ["a.json row 1"]),
        ("a.json", f"{GOOD}\n{GOOD}", ["a.json row 1", "a.json row 2"]),
        ("a.csv", "prompt,completion\nHi,Paris\n\nHi,Paris\n", ["a.csv:2", "a.csv:4"]),
        ("a.csv", "\ufeffprompt,completion\r\nHi,Paris\r\n", ["a.csv:2"]),
        ("a.csv", '\nid,prompt,completion\n1,"Hi\n\nthere",Paris\n2,Hi,Paris\n', ["a.csv:3", "a.csv:6"]),
        ("a.csv", "prompt,completion,\nHi,Paris,\n", ["a.csv:2"]),
    ],
)
def test_rows_are_read_with_the_line_where_they_begin(folder, name, content, places):
    examples = prepared(file(folder, name, content))
    assert examples.rows["where"][:] == places
    assert answers(examples) == ["Paris<|im_end|>"] * len(places)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", "", "a.jsonl: no rows"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows"),
        ("a.jsonl", f"{GOOD}\n{GOOD[:-4]}", "a.jsonl:2: not valid JSON: Unterminated string starting at at column 32"),
        ("a.jsonl", f"{GOOD}\n{GOOD} {GOOD}\n", "a.jsonl:2: not valid JSON: Extra data at column 41"),
        ("a.jsonl", f"\n{GOOD}\n[1, 2]\n", "a.jsonl:3: the row is not an object with named columns: it is a list"),
        ("a.jsonl", f"{GOOD}\n1e999\n", "a.jsonl:2: the row is not an object with named columns: it is a number"),
        ("a.jsonl", f"{GOOD}\nnull\n", "a.jsonl:2: the row is not an object with named columns: it is null"),
        ("a.jsonl", f'{GOOD}\n"x"\n', "a.jsonl:2: the row is not an object with named columns: it is a text"),
        ("a.jsonl", f"{GOOD}\n".encode() + b'{"prompt": "\xe9"}', "a.jsonl:2: not UTF-8: byte 0xe9 at position 13"),
        ("a.jsonl", f"{GOOD}\n".encode() + b'{"prompt": "\0"}', "a.jsonl:2: not valid JSON: Invalid control character"),
        ("a.jsonl", f"{GOOD}\n".encode("utf-16"), "a.jsonl: the file is UTF-16. Save it as UTF-8"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "a", "prompt": "b"}}',
         "a.jsonl:2: an object has the same name twice: 'prompt'"),
        ("a.jsonl", f"{GOOD}\n" + "[" * 200_000, "a.jsonl:2: unreadable JSON"),
        ("a.jsonl", f"{GOOD}\n" + "9" * 5000, "a.jsonl:2: unreadable JSON: Exceeds the limit"),
        ("a.jsonl", '{"prompt": "\\ud83d", "completion": "a"}', "a.jsonl:1: a message has half of a surrogate pair"),
        ("a.jsonl", '{"prompt": "a", "completion": null}\n' + GOOD,
         "a.jsonl:1: the column 'completion' is missing or null"),
        ("a.jsonl", '{"prompt": "a", "completion": 7}',
         "a.jsonl:1: the column 'completion' is not a text: it is a number"),
        ("a.json", "", "a.json: no rows"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.json", '"x"', "a.json: a .json file holds a list of objects, or objects; this one holds a text"),
        ("a.json", f"[{GOOD}]\n{GOOD}", "a.json:2: not valid JSON: Extra data at column 1"),
        ("a.json", f"[{GOOD},\n{GOOD[:-2]}", "a.json:2: not valid JSON"),
        ("a.json", f"[{GOOD}, 3]", "a.json row 2: the row is not an object"),
        ("a.json", b'[{"prompt":\n"\xff"}]', "a.json:2: not UTF-8: byte 0xff"),
        ("a.json", '[{"a": 1, "a": 2}]', "a.json row 1: an object has the same name twice: 'a'"),
        ("a.csv", "", "a.csv: no rows"),
        ("a.csv", "prompt,completion\n", "a.csv: no rows"),
        ("a.csv", "prompt,completion\nHi,Paris\n\nHi\n",
         "a.csv:4: the row does not fit the header: 1 cells under 2 columns"),
        ("a.csv", "prompt,completion\nHi,Paris,x\n", "a.csv: no readable row"),
        ("a.csv", "prompt,prompt\nHi,Paris\n", "a.csv:1: two columns have the same name"),
        ("a.csv", 'prompt,completion\nHi,Paris\n"Hi,Paris\nHi\n', "a.csv:3: not valid CSV: unexpected end of data"),
        ("a.csv", 'prompt,completion\nHi,"Pa"ris"\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"prompt,completion\nHi,Paris\nHi,P\xe9ris\n", "a.csv:3: not UTF-8: byte 0xe9"),
        ("a.csv", b"prompt,completion\nHi,Pa\0ris\n", "a.csv:2: the file holds NUL bytes"),
        ("a.csv", "prompt,completion\nHi,\nHi,Paris\n", "a.csv:2: the column 'completion' is missing or null"),
        ("a.parquet", b"", "a.parquet: not a readable Parquet file"),
        ("a.parquet", b"PAR1 nothing of it PAR1", "a.parquet: "),
        ("a.log", GOOD, "a.log: rows are read from files whose names end in .jsonl, .ndjson, .json, .csv, .tsv"),
        ("a", GOOD, "a: rows are read from"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_the_place(folder, name, content, reason):
    if reason == "a.csv: no readable row":
        reason = "a.csv:2: the row does not fit the header: 3 cells under 2 columns"
    assert reason in refusal(file(folder, name, content))


def test_paths_that_are_no_readable_file_are_errors(folder):
    assert "no.jsonl: there is no such file" in refusal(folder / "no.jsonl")
    (folder / "x.jsonl").mkdir()
    assert "x.jsonl: the folder has no data files" in refusal(folder / "x.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    assert "pipe.jsonl: this is not a regular file" in refusal(folder / "pipe.jsonl")
    assert "cannot be read: File name too long" in refusal(folder / f"{'x' * 300}.jsonl")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    assert "loop.jsonl: " in refusal(folder / "loop.jsonl")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_error(folder):
    path = file(folder, "a.jsonl", GOOD)
    path.chmod(0)
    assert "a.jsonl: cannot be read: Permission denied" in refusal(path)


def test_a_huge_line_is_read(folder):
    path = file(folder, "a.jsonl", json.dumps({"prompt": "one more " * 30_000, "completion": "b"}) + "\n" + GOOD)
    examples = prepared(path)
    assert examples.rows["where"][:] == ["a.jsonl:2"]
    assert examples.report.dropped.counts == {"longer than 1,024 tokens": 1}


def parquet(folder, rows, name="a.parquet"):
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


def test_nested_messages_of_a_parquet_file_are_read(folder):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi", "tool_calls": None},
                {"role": "assistant", "content": "Paris"},
            ]
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}], "prompt": None},
    ]
    assert answers(prepared(parquet(folder, rows))) == ["Paris<|im_end|>", "b<|im_end|>"]


def test_null_messages_of_a_parquet_file_name_their_row(folder):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}]},
        {"messages": None},
    ]
    assert "a.parquet row 2: the column 'messages' is missing or null" in refusal(parquet(folder, rows))


def test_a_truncated_parquet_file_is_an_error(folder):
    whole = parquet(folder, [{"prompt": "a", "completion": str(row)} for row in range(100)]).read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 1):
        assert "a.parquet: " in refusal(file(folder, "a.parquet", whole[:size]))


def test_bytes_that_are_no_text_in_a_parquet_file_are_an_error(folder):
    column = pa.array([b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": column, "completion": ["b"]}), folder / "a.parquet")
    assert "a.parquet" in refusal(folder / "a.parquet")


def test_two_parquet_columns_of_one_name_are_an_error(folder):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, folder / "a.parquet")
    assert "two columns have the same name" in refusal(folder / "a.parquet")


BROKEN = [
    GOOD,
    "{",
    '{"prompt": "a", }',
    "[1]",
    '{"prompt": "a"}',
    '{"prompt": 1, "completion": "b"}',
    '{"prompt": [], "completion": "b"}',
    '{"prompt": "a<|im_end|>", "completion": "b"}',
    "3",
    '{"prompt": "a", "completion": "\\ud83d"}',
]


def test_broken_rows_are_counted_by_reason_with_the_first_places(folder):
    report = prepared(file(folder, "a.jsonl", "\n".join(BROKEN * 7)), broken="drop").report
    assert (report.read, report.used) == (70, 7)
    assert report.dropped.counts == {
        "not valid JSON": 14,
        "the row is not an object with named columns": 14,
        "the column 'completion' is missing or null": 7,
        "the column 'prompt' is not a text": 14,
        "the row contains the text '<|im_end|>', which ends a turn of this model (take it out; if this row looks "
        "templated already, give its texts without the chat template's marks)": 7,
        "a message has half of a surrogate pair, which is not a character": 7,
    }
    first = report.dropped.first["not valid JSON"]
    assert [place.split(": ")[0] for place in first] == [f"a.jsonl:{line}" for line in (2, 3, 12, 13, 22)]
    assert all(" at column " in place for place in first)


def test_when_nothing_is_left_the_reasons_are_told(folder):
    path = file(folder, "a.jsonl", "\n".join(['{"prompt": "a", "completion": null}'] * 3 + ["{"]))
    error = refusal(path, broken="drop", format="prompt-completion")
    assert "a.jsonl: no rows left (4 read): 3 the column 'completion' is missing or null (first: a.jsonl:1)" in error
    assert "; 1 not valid JSON (first: a.jsonl:4: " in error


def test_every_source_must_have_rows(folder):
    settings = Data(train=[str(file(folder, "a.jsonl", GOOD)), str(file(folder, "empty.jsonl", ""))])
    with pytest.raises(UserError, match=r"empty\.jsonl: no rows"):
        examples_of(settings, ChatTemplate(TOKENIZER), Silent())[0]
