"""Data files are read as blocks: the same rows however they are stored, little memory, every fault with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import time
import tracemalloc

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.data.readers import files_in, read_blocks, read_file, text_stream
from lorakit.data.rows import RowError
from lorakit.errors import UserError

MIB = 1 << 20
RECORDS = [{"prompt": "Hi", "completion": "Paris"}, {"prompt": "größer\n😀", "completion": '"so", he\tsaid'}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def file(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(path):
    return [row.record for row in read_file(path)]


def refusal(path):
    with pytest.raises(UserError) as caught:
        list(read_file(path))
    assert str(path.parent) not in str(caught.value)  # shown relative to the working directory
    return str(caught.value)


def zstandard(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


# Without the time in its header: parallel workers must name the same tests.
DAMAGED = gzip.compress(b"{}\n", mtime=0) + b"more"
COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def separated(delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue()


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TEXTS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(RECORDS, indent=2),
    ".csv": separated(","),
    ".tsv": separated("\t"),
}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("suffix", TEXTS)
def test_every_kind_of_text_gives_the_same_rows_however_it_is_compressed(folder, suffix, compression):
    content = COMPRESSORS[compression](TEXTS[suffix].encode())
    assert records(file(folder, f"rows{suffix}{compression}", content)) == RECORDS
    assert records(file(folder, f"ROWS{suffix}{compression}".upper(), content)) == RECORDS


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_files_that_were_compressed_apart_and_joined_are_one(folder, compression):
    joined = COMPRESSORS[compression](LINES.encode()) * 3
    assert records(file(folder, f"rows.jsonl{compression}", joined)) == RECORDS * 3


def columns_file(folder, kind, table, rows_of_a_batch=None):
    path = folder / f"rows.{kind.split()[0]}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path)
    else:
        opener = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_of_a_batch)
    return path


COLUMN_KINDS = ["parquet", "feather", "arrow stream", "arrow file"]


@pytest.mark.parametrize("kind", COLUMN_KINDS)
def test_columns_of_every_kind_give_the_same_rows(folder, kind):
    nested = [{**record, "turns": [{"role": "user", "id": None}]} for record in RECORDS]
    path = columns_file(folder, kind, pa.Table.from_pylist(nested), 1)
    assert records(path) == nested
    assert [row.where for row in read_file(path)] == [f"{path.name} row 1", f"{path.name} row 2"]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", "\ufeff{}\r\n\r\n  \t\n{}", ["a.jsonl:1", "a.jsonl:4"]),
        ("a.jsonl", "{}\r{}\r", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", '{"a": "\u2028\x85"}\n{}', ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", ' \t{"a": 1} \n', ["a.jsonl:1"]),
        ("a.jsonl", "", []),
        ("a.jsonl", "\ufeff", []),
        ("a.json", "\ufeff[{},\r\n\r\n{}]\n", ["a.json row 1", "a.json row 2"]),
        ("a.json", "{}", ["a.json row 1"]),
        ("a.json", "\n{}\n{\n}{}\n", ["a.json row 1", "a.json row 2", "a.json row 3"]),
        ("a.json", " [ ] ", []),
        ("a.json", "", []),
        ("a.json", "\ufeff\n", []),
        ("a.csv", "\ufeffa,b\r\n1,2\r\n", ["a.csv:2"]),
        ("a.csv", "a,b\r1,2\r3,4", ["a.csv:2", "a.csv:3"]),
        ("a.csv", '\na,b\n1,"2\n\n3"\n\n4,5\n', ["a.csv:3", "a.csv:7"]),
        ("a.csv", "a,b\n", []),
        ("a.csv", "", []),
        ("a.tsv", "a\tb\n1,1\t2\n", ["a.tsv:2"]),
        ("a.txt", "one\ntwo", ["a.txt:1"]),
        ("a.md", "\ufeff# one\r\n", ["a.md:1"]),
        ("a.txt", " \n", []),
        ("a.txt", "", []),
    ],
)
def test_rows_are_named_by_the_line_where_they_begin(folder, name, content, places):
    rows = list(read_file(file(folder, name, content)))
    assert [row.where for row in rows] == places
    assert all(isinstance(row.record, dict) for row in rows)


ROW_FAULTS = [
    ("{", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
    ("{} {}", "not valid JSON: Extra data at column 4"),
    (' [{"a": 1}]', "the row is not an object with named columns: it is a list"),
    ("3", "the row is not an object with named columns: it is a number"),
    ('{"a": NaN}', "not valid JSON: NaN is not a JSON value"),
    ('{"a": [-Infinity]}', "not valid JSON: -Infinity is not a JSON value"),
    ('{"a": {"b": 1, "b": 1}}', "an object has the same name twice: 'b'"),
    (f'{{"a": {"9" * 5000}}}', "unreadable JSON: Exceeds the limit"),
]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        *ROW_FAULTS,
        ("[" * 100_000, "unreadable JSON: it is nested too deeply"),
        ('{"a":' * 100_000, "unreadable JSON: it is nested too deeply"),
        (b'{"a": "caf\xe9"}', "not UTF-8: byte 0xe9 at position 11"),
        (b'{"a": "\0"}', "not valid JSON: Invalid control character at at column 8"),
        ("\0\0", "not valid JSON: Expecting value at column 1; the line begins with '\\x00\\x00'"),
        ('{"a": "\u00a0', "not valid JSON: Unterminated string"),
    ],
)
def test_a_line_that_cannot_be_read_costs_one_row(folder, line, fault):
    line = line if isinstance(line, bytes) else line.encode()
    first, bad, last = read_file(file(folder, "a.jsonl", b"{}\n" + line + b"\n{}\n"))
    assert (first.record, last.record, bad.where) == ({}, {}, "a.jsonl:2")
    assert isinstance(bad.record, RowError)
    assert str(bad.record).startswith(fault)


@pytest.mark.parametrize(("value", "fault"), [fault for fault in ROW_FAULTS if "not valid JSON: E" not in fault[1]])
def test_a_value_of_a_list_that_is_refused_costs_one_row(folder, value, fault):
    first, bad, last = read_file(file(folder, "a.json", f"[{{}}, {value}, {{}}]"))
    assert (first.record, last.record, bad.where) == ({}, {}, "a.json row 2")
    assert str(bad.record).startswith(fault)


def test_a_lone_surrogate_stays_as_it_is(folder):
    assert records(file(folder, "a.jsonl", '{"a": "\\ud83d"}')) == [{"a": "\ud83d"}]
    assert records(file(folder, "a.json", '[{"a": "\\ud83d"}]')) == [{"a": "\ud83d"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "\n x", "a.json:2: not valid JSON: Expecting value at column 2"),
        ("a.json", '"x"', "a.json: a .json file holds a list of objects, or objects; this one holds a text"),
        ("a.json", "7", "this one holds a number"),
        ("a.json", "[{},\n{},]", "a.json:2: not valid JSON: a comma before the end of the list at column 4"),
        ("a.json", "[{},\n{}", "a.json:2: not valid JSON: Expecting ',' delimiter at column 3"),
        ("a.json", "[{} {}]", "a.json:1: not valid JSON: Expecting ',' delimiter at column 5"),
        ("a.json", "[{}]\n{}", "a.json:2: not valid JSON: Extra data at column 1"),
        ("a.json", "{},{}", "a.json:1: not valid JSON: Expecting value at column 3"),
        ("a.json", '[{"a": "x}]', "a.json:1: not valid JSON: Unterminated string starting at at column 8"),
        ("a.json", "[" * 100_000, "a.json:1: unreadable JSON: it is nested too deeply"),
        ("a.json", b'[{"a":\n"\xff"}]', "a.json:2: not UTF-8: byte 0xff"),
        ("a.json", b'[{"a":\n"\xc3', "a.json:2: not UTF-8: byte 0xc3"),
        ("a.json", b'[{"a":\0 "b"}]', "a.json:1: not valid JSON: Expecting value at column 7"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: two columns have the same name"),
        ("a.csv", 'a,b\n1,2\n"1,2\n3\n', "a.csv:3: not valid CSV: unexpected end of data"),
        ("a.csv", 'a,b\n1,"2"3"\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"a,b\n1,2\n1,\xe9\n", "a.csv:3: not UTF-8: byte 0xe9"),
        ("a.tsv", b"a\tb\n1\t\0\n", "a.tsv:2: the file holds NUL bytes"),
        ("a.txt", b"one\ntwo\xe9\n", "a.txt:2: not UTF-8: byte 0xe9"),
        ("a.txt", b"one\n\0", "a.txt:2: the file holds NUL bytes"),
        ("a.parquet", b"", "a.parquet: not a readable Parquet file"),
        ("a.parquet", b"PAR1 nothing of it PAR1", "a.parquet: not a readable Parquet file"),
        ("a.arrow", b"", "a.arrow: not a readable Arrow file"),
        ("a.arrow", b"ARROW1 nothing of it", "a.arrow: not a readable Arrow file"),
        ("a.feather", b"FEA1 and more", "a.feather: not a readable Arrow file"),
        ("a.log", "x", "a.log: rows are read from files whose names end in .jsonl, .ndjson, .json, .csv, .tsv, .txt"),
        ("a.parquet.gz", "x", "not from .gz"),
        ("a", "x", "a: rows are read from"),
        *((f"a{suffix}", LINES.encode("utf-16"), f"a{suffix}: the file is UTF-16") for suffix in (*TEXTS, ".txt")),
        *(
            (f"a.jsonl{ending}", LINES, f"a.jsonl{ending}: not a ")
            for ending in (".gz", ".bz2", ".xz", ".zst")
        ),
        ("a.jsonl.gz", DAMAGED, "a.jsonl.gz: the gzip data is damaged after line 1"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_an_error_that_names_the_place(folder, name, content, reason):
    assert reason in refusal(file(folder, name, content))


def test_cells_that_do_not_fit_the_header_cost_one_row(folder):
    rows = list(read_file(file(folder, "a.csv", "a,b\n1,\n1\n1,2,3\n4,5\n")))
    assert [row.where for row in rows] == ["a.csv:2", "a.csv:3", "a.csv:4", "a.csv:5"]
    assert rows[0].record == {"a": "1", "b": None}
    assert [str(row.record).split(": ")[1] for row in rows[1:3]] == [
        "1 cells under 2 columns",
        "3 cells under 2 columns",
    ]


@pytest.mark.parametrize("compression", list(COMPRESSORS)[1:])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".txt"])
def test_a_cut_compressed_file_is_an_error_behind_whole_rows(folder, suffix, compression):
    rows = [{"id": str(number), "text": os.urandom(40).hex()} for number in range(4000)]
    texts = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".csv": "id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in rows),
        ".json": json.dumps(rows, indent=0),
        ".txt": "".join(f"{row['text']}\n" for row in rows),
    }
    whole = COMPRESSORS[compression](texts[suffix].encode())
    for size in (5, 20, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path, found = file(folder, f"a{suffix}{compression}", whole[:size]), []
        with pytest.raises(UserError, match=r"is cut off after line \d+: ") as caught:
            found.extend(row.record for row in read_file(path))
        readable = int(str(caught.value).split("after line ")[1].split(":")[0])
        if suffix == ".txt":
            assert [row["text"] for row in found] == ["".join(f"{row['text']}\n" for row in rows[:readable])] * bool(
                found
            )
        else:
            assert found == rows[: len(found)]
        if suffix == ".jsonl":
            assert len(found) == readable


@pytest.mark.parametrize("kind", COLUMN_KINDS)
def test_a_cut_file_of_columns_is_an_error_behind_whole_rows(folder, kind):
    rows = [{"id": number, "text": "x" * (number % 50)} for number in range(1000)]
    path = columns_file(folder, kind, pa.Table.from_pylist(rows), 100)
    whole = path.read_bytes()
    for size in (5, 100, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:size])
        found = []
        with pytest.raises(UserError, match=f"{path.name}: not a readable (Parquet|Arrow) file"):
            found.extend(row.record for row in read_file(path))
        assert found == rows[: len(found)]


def travelled(block):
    """A block as another process gets it."""
    return pickle.loads(pickle.dumps(block))  # noqa: S301


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_columns_are_handed_over_in_small_parts_with_their_rows_numbered(folder, kind):
    rows = [{"id": number, "text": f"{number} " * 200} for number in range(5000)]
    path = columns_file(folder, kind, pa.Table.from_pylist(rows))
    blocks = [travelled(block) for block in read_blocks(path)]
    assert len(blocks) > 3
    assert max(len(block.payload) for block in blocks) < 2 * MIB
    read = [row for block in blocks for row in block.rows()]
    assert [row.record for row in read] == rows
    assert [row.where for row in read] == [f"{path.name} row {number}" for number in range(1, 5001)]
    assert 0.99 < sum(block.size for block in blocks) / path.stat().st_size <= 1


def test_an_unclosed_quote_does_not_take_a_file_into_memory(folder):
    path = file(folder, "a.csv", 'a\n"x\n' + "many lines\n" * 7_000_000)
    assert "a.csv:2: not valid CSV: field larger than field limit" in refusal(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow stream"])
def test_two_columns_of_one_name_are_an_error(folder, kind):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    assert "two columns have the same name: prompt, prompt" in refusal(columns_file(folder, kind, table))


def test_a_parquet_value_that_python_cannot_hold_costs_one_row(folder):
    broken = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    path = columns_file(folder, "parquet", pa.table({"text": broken, "day": pa.array([1, 2], pa.date32())}))
    good, bad = read_file(path)
    assert good.record["text"] == "good"
    assert bad.where == "rows.parquet row 2"
    assert str(bad.record).startswith("a value cannot be read: 'utf-8' codec can't decode")


def test_arrow_offsets_that_point_outside_the_file_are_an_error(folder):
    path = columns_file(folder, "arrow stream", pa.table({"lists": [["some words"]] * 100}))
    whole = path.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in range(0, 1010, 10))
    assert offsets in whole
    path.write_bytes(whole.replace(offsets, offsets[:40] + b"\xff\xff\xff\x7f" + offsets[44:]))
    assert "rows.arrow: not a readable Arrow file" in refusal(path)


@pytest.mark.parametrize(
    ("suffix", "compression"),
    [
        pytest.param(".jsonl", compression, marks=[pytest.mark.slow] * (compression in (".bz2", ".xz")))
        for compression in COMPRESSORS
    ]
    + [(suffix, compression) for suffix in (".json", ".csv", ".txt") for compression in ("", ".gz")],
)
def test_blocks_are_about_a_mebibyte_travel_to_other_processes_and_add_up_to_the_file(folder, suffix, compression):
    words = [f"{number * 7919 % 10007:x}" * 9 for number in range(80_000)]
    texts = {
        ".jsonl": "".join(f'{{"text": "{word}"}}\n' for word in words),
        ".json": json.dumps([{"text": word} for word in words]),
        ".csv": "text\n" + "".join(f"{word}\n" for word in words),
        ".txt": "".join(f"{word}\n" for word in words),
    }
    path = file(folder, f"a{suffix}{compression}", COMPRESSORS[compression](texts[suffix].encode()))
    blocks = [travelled(block) for block in read_blocks(path)]
    assert 3 <= len(blocks) <= 16
    assert 0.99 < sum(block.size for block in blocks) / path.stat().st_size <= 1
    rows = [row for block in blocks for row in block.rows()]
    if suffix == ".txt":
        assert "".join(row.record["text"] for row in rows) == texts[suffix]
        lines = [int(row.where.split(":")[1]) for row in rows]
        sizes = [row.record["text"].count("\n") for row in rows]
        assert lines == [1 + sum(sizes[:part]) for part in range(len(sizes))]
        assert all(row.record["text"].endswith("\n") for row in rows)
    else:
        assert [row.record["text"] for row in rows] == words
        first = 2 if suffix == ".csv" else 1
        separator = " row " if suffix == ".json" else ":"
        assert [row.where for row in rows] == [f"{path.name}{separator}{number + first}" for number in range(80_000)]


def test_a_text_of_one_mebibyte_is_one_row(folder):
    for text in ("x\n" * (MIB // 2), "x\n" * (MIB // 2 - 1) + "yy"):
        assert records(file(folder, "a.txt", text)) == [{"text": text}]


def test_line_ends_of_a_text_become_line_feeds(folder):
    assert records(file(folder, "a.txt", "one\r\ntwo\r\n")) == [{"text": "one\ntwo\n"}]
    assert records(file(folder, "a.txt", "one\rtwo\r")) == [{"text": "one\ntwo\n"}]


@pytest.mark.parametrize(
    ("name", "content", "times"),
    [
        ("a.jsonl", '{{"text": "{}"}}\n{{}}\n', 4),
        ("a.json", '[{{"text": "{}"}}, {{}}]', 4),
        ("a.txt", "{}\nx\n", 4),
        ("a.csv", 'text\n"{}"\nx\n', 12),  # Python's csv module collects a cell in four bytes a character
    ],
)
def test_a_huge_line_is_read_in_a_few_times_its_memory(folder, name, content, times):
    size = 20 * MIB
    path = file(folder, name, content.format("x" * size))
    tracemalloc.start()
    longest = 0
    for block in read_blocks(path):
        for row in block.rows():
            longest = max(longest, len(row.record.get("text") or ""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest >= size
    assert peak < times * size


def test_a_large_file_is_read_in_little_memory_and_fast(folder):
    path = folder / "a.jsonl"
    lines = "".join(f'{{"prompt": "question {number}", "completion": "{"word " * 60}"}}\n' for number in range(3000))
    with path.open("w") as sink:
        for _ in range(60 * MIB // len(lines) + 1):
            sink.write(lines)
    assert path.stat().st_size > 60 * MIB
    started = time.perf_counter()
    count = sum(1 for block in read_blocks(path) for _ in block.rows())
    assert time.perf_counter() - started < 3
    assert count == 3000 * (60 * MIB // len(lines) + 1)
    tracemalloc.start()
    for block in read_blocks(path):
        assert len(block.payload) < 2 * MIB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MIB


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=90),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
SMALL_BLOCKS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@SMALL_BLOCKS
@given(
    values=st.lists(JSON, max_size=12),
    block=st.integers(4, 90),
    indent=st.none() | st.integers(0, 2),
    ascii=st.booleans(),
    listed=st.booleans(),
)
def test_a_json_file_means_the_same_wherever_its_blocks_end(folder, values, block, indent, ascii, listed):
    if not listed:
        values = [{"value": value} for value in values]
    texts = [json.dumps(value, indent=indent, ensure_ascii=ascii) for value in values]
    text = f"[{', '.join(texts)}]" if listed else "\n".join(texts)
    path = file(folder, "a.json", text.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, "BLOCK", block)
        read = list(read_file(path)) if values or listed else []
    assert [row.record if isinstance(value, dict) else None for row, value in zip(read, values, strict=True)] == [
        value if isinstance(value, dict) else None for value in values
    ]
    assert [row.where for row in read] == [f"a.json row {number}" for number in range(1, len(values) + 1)]


@SMALL_BLOCKS
@given(
    cells=st.lists(st.tuples(*[st.text(st.sampled_from('ab",\n\t ü'), max_size=8)] * 2), max_size=12),
    block=st.integers(4, 40),
    ending=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from([",", "\t"]),
)
def test_a_csv_file_means_the_same_wherever_its_blocks_end(folder, cells, block, ending, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=ending).writerows([("one", "two"), *cells])
    path = file(folder, "a.csv" if delimiter == "," else "a.tsv", text.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, "BLOCK", block)
        rows = list(read_file(path))
    assert [row.record for row in rows] == [{"one": one or None, "two": two or None} for one, two in cells]
    before = 2
    for row, (one, two) in zip(rows, cells, strict=True):
        assert row.where == f"{path.name}:{before}"
        before += 1 + one.count("\n") + two.count("\n")


@SMALL_BLOCKS
@given(content=st.binary(max_size=60), place=st.integers(0, 200), suffix=st.sampled_from([
    ".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet",
    ".arrow",
]))  # fmt: skip
def test_damage_anywhere_is_a_users_error_or_a_rows(folder, content, place, suffix):
    compression = next((ending for ending in COMPRESSORS if ending and suffix.endswith(ending)), "")
    kind = suffix.removesuffix(compression)
    if kind in (".parquet", ".arrow"):
        made = columns_file(folder, "parquet" if kind == ".parquet" else "arrow file", pa.Table.from_pylist(RECORDS))
        whole = made.read_bytes()
    else:
        whole = COMPRESSORS[compression](TEXTS.get(kind, "words\n").encode())
    path = file(folder, f"a{suffix}", whole[:place] + content + whole[place + len(content) :])
    try:
        rows = list(read_file(path))
    except UserError as error:
        assert str(error).startswith(path.name)
    else:
        assert all(isinstance(row.record, dict | RowError) for row in rows)


def test_a_folder_means_the_data_files_below_it_in_order(folder):
    wanted = ["data/a.jsonl", "data/b/c.CSV", "data/b/d.json.gz", "data/z.parquet"]
    others = ["data/.hidden.jsonl", "data/.git/x.json", "data/notes.docx", "data/none", "other.jsonl"]
    for name in wanted + others:
        file(folder, name, "")
    assert files_in(folder / "data") == [folder / name for name in wanted]
    assert files_in(folder / "other.jsonl") == [folder / "other.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("data/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("data/?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("data/[b-z]*", ["b.jsonl"]),
        ("data/*", ["a.jsonl", "b.jsonl"]),
        ("data/**", ["a.jsonl", "b.jsonl", "in/c.jsonl", "in/deep/d.csv"]),
        ("data/**/*.jsonl", ["a.jsonl", "b.jsonl", "in/c.jsonl"]),
        ("data/**/deep/*", ["in/deep/d.csv"]),
        ("data/*/*.jsonl", ["in/c.jsonl"]),
        ("d*a/i[n]/c.jsonl", ["in/c.jsonl"]),
        ("data/.h*", [".h.jsonl"]),
    ],
)
def test_a_pattern_means_the_data_files_that_it_matches_in_order(folder, pattern, names):
    for name in ("a.jsonl", "b.jsonl", "b.jsonl.bak", "in/c.jsonl", "in/deep/d.csv", ".h.jsonl", ".x/y.jsonl"):
        file(folder, f"data/{name}", "")
    assert files_in(folder / pattern) == [folder / "data" / name for name in names]


def test_what_exists_is_never_taken_as_a_pattern(folder):
    literal = file(folder, "run[1]/a*.jsonl", "")
    file(folder, "run[1]/ab.jsonl", "")
    file(folder, "run1/ab.jsonl", "")
    assert files_in(literal) == [literal]
    assert files_in(folder / "run[1]") == [literal, folder / "run[1]" / "ab.jsonl"]
    assert files_in(folder / "run[1]" / "*b.jsonl") == [folder / "run[1]" / "ab.jsonl"]


def test_links_that_lead_in_a_circle_are_followed_once(folder):
    real = file(folder, "data/a.jsonl", "{}")
    (folder / "data" / "up").symlink_to(folder / "data")
    (folder / "data" / "loop.jsonl").symlink_to("loop.jsonl")
    file(folder, "far/b.jsonl", "{}")
    (folder / "data" / "linked").symlink_to(folder / "far")
    expected = [real, folder / "data" / "linked" / "b.jsonl", folder / "data" / "loop.jsonl"]
    assert files_in(folder / "data") == expected
    assert files_in(folder / "data" / "**") == expected
    assert "data/loop.jsonl: cannot be read: Too many levels of symbolic links" in refusal_of_name(expected[-1])


def refusal_of_name(path):
    with pytest.raises(UserError) as caught:
        list(read_file(path))
    return str(caught.value)


def test_a_folder_or_pattern_without_data_files_is_an_error_with_the_known_endings(folder):
    file(folder, "data/x.log", "")
    with pytest.raises(
        UserError, match=r"^data: the folder has no data files\. Their names end in \.jsonl, .*\.zst\.$"
    ):
        files_in(folder / "data")
    with pytest.raises(
        UserError, match=r"^data/\*\.csv: the pattern matches no data file\. Their names end in \.jsonl"
    ):
        files_in(folder / "data" / "*.csv")
    with pytest.raises(UserError, match=r"^none/\*\.csv: the pattern matches no data file"):
        files_in(folder / "none" / "*.csv")


def test_a_pipe_among_the_files_of_a_folder_is_refused_and_never_waited_for(folder, recipe_file, lorakit):
    (folder / "rows").mkdir()
    file(folder / "rows", "a.jsonl", b'{"prompt": "Hi", "completion": "Paris"}')
    (folder / "rows" / "gone.jsonl").symlink_to("nowhere.jsonl")  # its reader says so
    assert len(files_in(folder / "rows")) == 2
    os.mkfifo(folder / "rows" / "pipe.jsonl")
    for train in ("rows", "rows/*.jsonl"):
        code, _, err = lorakit("data", recipe_file(data={"train": train, "eval": ...}))
        assert code == 2 and "rows/pipe.jsonl: this is not a regular file" in err


def test_what_is_no_readable_file_is_an_error_and_never_waited_for(folder):
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "x.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere.jsonl")
    (folder / "device.jsonl").symlink_to("/dev/zero")
    for name, said in {
        "pipe.jsonl": "this is not a regular file",
        "device.jsonl": "this is not a regular file",
        "loop.jsonl": "cannot be read: Too many levels of symbolic links",
        "gone.jsonl": "there is no such file",
        "no.jsonl": "there is no such file",
        f"{'x' * 300}.jsonl": "cannot be read: File name too long",
    }.items():
        assert f": {said}" in refusal(folder / name)
        with pytest.raises(UserError, match=said):
            files_in(folder / name)
    assert "x.jsonl: this is a folder. Write the path of a data file" in refusal(folder / "x.jsonl")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_file_or_folder_without_permission_is_an_error(folder, name):
    path = file(folder, f"data/{name}", "{}")
    path.chmod(0)
    assert "ermission denied" in refusal_of_name(path)
    path.parent.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        files_in(path.parent)
    path.parent.chmod(0o700)
