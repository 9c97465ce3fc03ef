"""Files as strangers bring them: read as they are meant, or refused with what to do."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import rows_of, write_rows

from lorakit.data.formats import parse_record
from lorakit.data.rows import RowError
from lorakit.data.sources import open_source
from lorakit.errors import UserError
from lorakit.plan.row_sample import sample_source
from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.schema import Source

ROWS = [{"prompt": f"Where is {place}?", "completion": f"In {land}, ö."} for place, land in ("ab", "cd", "ef")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHATS = rows_of(3)
TURNS = [[{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]]


def table(rows, **dialect) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parquet(rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def opened(folder, name, content, **settings):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_source(Source(path=str(path), **{"format": "auto", "columns": {}, **settings}))


def records(source):
    return [row.record for block in source.blocks for row in block.rows()]


AS_MEANT = {
    "semicolons.csv": table(ROWS, delimiter=";"),
    "tabs.csv": table(ROWS, delimiter="\t"),
    "bars.csv": table(ROWS, delimiter="|"),
    "commas.tsv": table(ROWS),
    "excel.csv": "\ufeff" + table(ROWS, delimiter=";", lineterminator="\r\n"),
    "excel-said.csv": "sep=;\r\n" + table(ROWS, delimiter=";"),
    "excel-columns-without-name.csv": table(ROWS, delimiter=";", lineterminator="\n").replace("\n", ";;\n"),
    "quoted-header.csv": table(ROWS, quoting=csv.QUOTE_ALL, delimiter=";"),
    "blanks.csv": "prompt, completion\n" + "".join(f'{row["prompt"]}, "{row["completion"]}"\n' for row in ROWS),
    "blanks-in-the-header.csv": table(ROWS).replace("prompt,completion", "prompt ,completion "),
    "two-marks.jsonl": "\ufeff\ufeff" + LINES,
    "two-marks.json": "\ufeff\ufeff" + json.dumps(ROWS),
    "joined.jsonl": f"\ufeff{json.dumps(ROWS[0])}\n\ufeff{json.dumps(ROWS[1])}\n\ufeff{json.dumps(ROWS[2])}\n",
    "joined.json": "\ufeff".join(map(json.dumps, ROWS)),
    "lines.json": LINES,
    "joined.csv": "\ufeff" + table(ROWS[:2]) + "\ufeff" + table(ROWS[2:]).partition("\n")[2],
}  # fmt: skip


@pytest.mark.parametrize("name", AS_MEANT)
def test_what_can_only_be_meant_one_way_is_read_so(name, tmp_path):
    assert records(opened(tmp_path, name, AS_MEANT[name])) == ROWS


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_large_table_is_looked_at_with_its_own_delimiter(delimiter, tmp_path):
    many = [{"prompt": f"Q, {number} " + "x" * 300, "completion": "A, b"} for number in range(9000)]
    path = tmp_path / "large.csv"
    path.write_text(table(many, delimiter=delimiter))
    found = sample_source(Source(path=str(path), format="auto", columns={}))
    assert not found.whole and found.total == 9000
    assert all(row.record in many for row in found.rows) and len(found.rows) > 100


REFUSED = {
    "list.jsonl": (json.dumps(ROWS), "list.jsonl: the file is one JSON list", "such as list.json"),
    "written.jsonl": (json.dumps(ROWS, indent=1), "one JSON list", "such as written.json"),
    "bracketed.jsonl": ("[\n" + LINES.replace("}\n", "},\n")[:-2] + "\n]\n", "one JSON list", "bracketed.json"),
    "objects.jsonl": ("\n".join(json.dumps(row, indent=2) for row in ROWS), "over several lines", "objects.json"),
    "rows.txt": (LINES, "seems to hold JSON objects, one a line", "such as rows.jsonl, or write data.format: text"),
    "rows.md": (LINES, "seems to hold JSON objects, one a line", "such as rows.jsonl"),
    "rows.txt.gz": (gzip.compress(LINES.encode()), "seems to hold JSON objects", "rows.jsonl"),
    "list.txt": (json.dumps(ROWS), "seems to hold a JSON list", "such as list.json"),
    "table.txt": (table(ROWS), "seems to hold a table with a header", "such as table.csv"),
    "table-of-tabs.txt": (table(ROWS, delimiter="\t"), "a table with a header", "table-of-tabs.tsv"),
    "packed.jsonl": (gzip.compress(LINES.encode()), "the file is gzip data", "such as packed.jsonl.gz"),
    "packed.csv": (bz2.compress(table(ROWS).encode()), "the file is bzip2 data", "such as packed.csv.bz2"),
    "packed.json": (lzma.compress(json.dumps(ROWS).encode()), "the file is xz data", "such as packed.json.xz"),
    "packed.parquet": (gzip.compress(LINES.encode()), "the file is gzip data", ".gz"),
    "columns.json": (parquet(ROWS), "the file is a Parquet file", ".parquet"),
    "columns.txt": (parquet(ROWS), "the file is a Parquet file", ".parquet"),
    "columns.arrow": (parquet(ROWS), "the file is a Parquet file", ".parquet"),
    "lines.parquet": (LINES, "holds JSON", ".jsonl"),
    "list.arrow": (json.dumps(ROWS), "holds JSON", ".json"),
    "sheet.csv": (b"PK\x03\x04 and so on", "a zip archive, or an Excel file", "CSV in UTF-8"),
    "page.jsonl": ("<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page", "Download"),
    "pointer.jsonl": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "Git LFS", "git lfs pull"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS", "git lfs pull"),
    "pickled.json": (b"\x80\x04\x95\x0c\x00\x00\x00", "a Python pickle", "run code"),
    "wide.jsonl": (LINES.encode("utf-16"), "the file is UTF-16", "Save it as UTF-8"),
    "wide-unmarked.csv": (table(ROWS).encode("utf-16-le"), "UTF-16 without a byte order mark", "UTF-8"),
    "wider.json": (json.dumps(ROWS).encode("utf-32"), "the file is UTF-32", "UTF-8"),
    "western.csv": ("prompt,completion\nZürich?,é\n".encode("cp1252"), "western.csv:2: not UTF-8", "Windows-1252"),
    "no-header.csv": ("Where?,There\nWhen?,Then\n", "no format fits", "The first line names the columns"),
    "wrapped.json": (json.dumps({"version": "1", "data": ROWS}), "no format fits", "The rows seem to be under 'data'"),
    "comma.json": (json.dumps(ROWS)[:-1] + ",]", "a comma before the end of the list", "column"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_what_its_name_says_is_refused_with_what_to_do(name, tmp_path):
    content, *said_of_it = REFUSED[name]
    with pytest.raises(UserError) as refused:
        records(opened(tmp_path, name, content))
    assert all(words in str(refused.value) for words in said_of_it), refused.value


ROWS_REFUSED = {
    "commas behind": (json.dumps(ROWS[0]) + ",", "a comma follows the object"),
    "two in one line": (json.dumps(ROWS[0]) + json.dumps(ROWS[1]), "another object follows it"),
    "joined without a break": (json.dumps(ROWS[0]) + "\ufeff" + json.dumps(ROWS[1]), "another object follows it"),
    "written by Python": (str(ROWS[0]), "Python wrote the row, not JSON"),
    "a comment": ("# rows of May", "the line begins with '# rows of May'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS_REFUSED)
def test_a_line_that_is_no_row_says_what_seems_to_be_meant(case, tmp_path):
    line, words = ROWS_REFUSED[case]
    *_, refused = records(opened(tmp_path, "a.jsonl", f"{LINES}{line}\n"))
    assert isinstance(refused, RowError) and words in str(refused)


def test_a_header_that_stands_in_the_middle_is_no_row(tmp_path):
    *rows, last = records(opened(tmp_path, "a.csv", table(ROWS[:2]) + "\ufeff" + table(ROWS[2:])))
    assert last == ROWS[2] and rows[:2] == ROWS[:2]
    assert isinstance(rows[2], RowError) and "the header once more" in str(rows[2])


def test_plain_texts_that_only_look_like_rows_are_documents(tmp_path):
    for name, text in {
        "a.txt": "{not json}\nbut braces\n",
        "b.txt": "Prompt, completion and text are words.\nThis is prose.\n",
        "c.md": "[1] A footnote.\n\n[2] Another.\n",
        "d.txt": "prompt\ncompletion\n",
    }.items():
        source = opened(tmp_path, name, text)
        assert source.format == "text" and records(source) == [{"text": text}]
    assert opened(tmp_path, "e.txt", LINES, format="text").format == "text"


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_conversations_that_a_table_holds_as_json_text_are_conversations(name, tmp_path):
    def stored(rows):
        if name == "a.csv":
            return table(rows)
        return parquet(rows) if name == "a.parquet" else "".join(json.dumps(row) + "\n" for row in rows)

    chats = opened(tmp_path, name, stored([{"messages": json.dumps(chat["messages"])} for chat in CHATS]))
    assert [parse_record("messages", None, row) for row in records(chats)] == [
        parse_record("messages", None, row) for row in CHATS
    ]
    turns = opened(tmp_path, name, stored([{"conversations": json.dumps(turns)} for turns in TURNS]))
    assert parse_record("sharegpt", None, records(turns)[0]) == parse_record(
        "sharegpt", None, {"conversations": TURNS[0]}
    )
    row = {"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}
    sides = opened(tmp_path, name, stored([{key: json.dumps(value) for key, value in row.items()}]))
    assert parse_record("prompt-completion", None, records(sides)[0]) == parse_record("prompt-completion", None, row)
    squad = {"question": "Where?", "answers": {"text": ["There"], "answer_start": [3]}}
    asked = opened(tmp_path, name, stored([{**squad, "answers": json.dumps(squad["answers"])}]))
    assert parse_record("question-answer", None, records(asked)[0]) == parse_record("question-answer", None, squad)


def test_conversations_that_python_wrote_are_refused_with_what_to_do(tmp_path):
    for row, name in (
        ({"messages": str(CHATS[0]["messages"])}, "messages"),
        ({"conversations": str(TURNS[0])}, "sharegpt"),
        ({"prompt": str(CHATS[0]["messages"][:1]), "completion": str(CHATS[0]["messages"][1:])}, "prompt-completion"),
        ({"question": "Where?", "answers": str({"text": ["There"], "answer_start": [3]})}, "question-answer"),
    ):
        with pytest.raises(RowError, match=r"written by Python, not as JSON \(write it with json\.dumps\)"):
            parse_record(name, None, row)


def test_a_prompt_about_json_stays_a_text():
    row = {"prompt": '[{"id": 1}]', "completion": '{"role": "x"}'}
    assert parse_record("prompt-completion", None, row).messages[0]["content"] == row["prompt"]


def test_line_breaks_in_texts_are_line_feeds_whichever_file_they_come_from(tmp_path):
    row = {"messages": [{"role": "user", "content": "a\r\nb"}, {"role": "assistant", "content": "c\r\n\r\nd\re"}]}
    fed = {"messages": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c\n\nd\re"}]}
    for name, content in {
        "a.jsonl": json.dumps(row) + "\r\n",
        "b.jsonl": json.dumps(row).replace("\\r\\n", "\\u000d\\u000A") + "\n",
        "a.json": json.dumps([row]),
        "a.parquet": parquet([row]),
    }.items():
        assert records(opened(tmp_path, name, content)) == [fed], name
    flat = {"prompt": "a\r\nb", "completion": "c\r\n"}
    assert records(opened(tmp_path, "a.csv", table([flat]))) == [{"prompt": "a\nb", "completion": "c\n"}]
    assert records(opened(tmp_path, "a.txt", "a\r\nb\r\n")) == [{"text": "a\nb\n"}]


def test_documents_beside_rows_are_named_with_the_pattern_that_leaves_them_out(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(parquet(ROWS))
    (folder / "README.md").write_text("# Rows\n\nFrom somewhere.\n")
    with pytest.raises(
        UserError, match=r"README\.md\) lie beside files of rows .*by a pattern, such as '.*rows/\*\.parquet'"
    ):
        open_source(Source(path=str(folder), format="auto", columns={}))
    assert len(records(open_source(Source(path=str(folder / "*.parquet"), format="auto", columns={})))) == 3
    (folder / "train.parquet").unlink()
    write_rows(folder / "texts.jsonl", [{"text": "Also a document."}])
    assert open_source(Source(path=str(folder), format="auto", columns={})).format == "text"


@pytest.mark.parametrize("key", ["data", "model", "output", "template"])
def test_a_variable_in_a_path_is_refused_and_a_file_of_that_name_is_not(key, recipe_file, tmp_path):
    sections = {
        "data": {"data": {"train": "${DATA}/train.jsonl", "eval": ...}},
        "model": {"model": {"base": "$MODELS/llama"}},
        "output": {"output": {"dir": "${HOME}/runs"}},
        "template": {"model": {"chat_template": "%APPDATA%/chat.jinja"}},
    }[key]
    with pytest.raises(RecipeErrors, match="holds an environment variable, and a recipe reads none"):
        load(recipe_file(**sections))
    write_rows(tmp_path / "$1.jsonl", rows_of(2))
    write_rows(tmp_path / "$x.jsonl", rows_of(2))
    assert load(recipe_file(data={"train": ["$1.jsonl", "$x.jsonl"]})).recipe.data.train[1].endswith("/$x.jsonl")


def test_the_home_folder_is_meant_wherever_a_path_begins_with_its_sign(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write_rows(tmp_path / "home" / "rows.jsonl", rows_of(2))
    recipe = load(recipe_file(data={"train": "~/rows.jsonl"}, output={"dir": "~/runs/a"})).recipe
    assert (recipe.data.train, recipe.output.dir) == (f"{tmp_path}/home/rows.jsonl", f"{tmp_path}/home/runs/a")


def test_a_resume_that_finds_nothing_is_refused_with_the_nearest_run(recipe_file, tmp_path, lorakit):
    path = recipe_file()
    code, _, err = lorakit("train", path, "--resume")
    assert code == 2 and "there is no such run. Give the folder of a run" in err
    (tmp_path / "runs" / "tiny-2").mkdir(parents=True)
    facts = {"base": {"sha256": {}}, "data": {"files": {}}}
    (tmp_path / "runs" / "tiny-2" / "manifest.json").write_text(json.dumps(facts))
    code, _, err = lorakit("train", path, "--resume", "--output", "runs/tiny-3")
    assert code == 2 and "runs/tiny-3: there is no such run. Did you mean runs/tiny-2?" in err
    assert not (tmp_path / "runs" / "tiny-3").exists()
