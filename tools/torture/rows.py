"""Rows in every kind of file, damaged as values and as bytes: each is trained, held out or dropped with its reason, and
what is trained of an undamaged one is its answer; or the file is refused as a user's."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.errors import UserError
from lorakit.progress import Silent
from lorakit.recipe.schema import Clean, Data
from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.mutate import mutate_bytes, mutate_value
from tools.torture.workshop import TOPICS, make_tokenizer

_STOP = "<|im_end|>"
Rows = list[dict[str, Any]]


def _question(number: int) -> str:
    return f"What of {TOPICS[number % 8]}, number {number}?"


def _answer(number: int) -> str:
    return json.dumps({"topic": TOPICS[number % 8], "number": number}, ensure_ascii=False) + " é😀"[: number % 4]


def _talk(names: tuple[str, str], roles: tuple[str, str], number: int) -> list[dict[str, str]]:
    role, content = names
    return [{role: roles[0], content: _question(number)}, {role: roles[1], content: _answer(number)}]


_FORMATS: dict[str, Callable[[int], dict[str, Any]]] = {
    "messages": lambda n: {"messages": _talk(("role", "content"), ("user", "assistant"), n)},
    "sharegpt": lambda n: {"conversations": _talk(("from", "value"), ("human", "gpt"), n)},
    "alpaca": lambda n: {"instruction": _question(n), "input": "", "output": _answer(n)},
    "prompt-completion": lambda n: {"prompt": _question(n), "completion": _answer(n)},
    "question-answer": lambda n: {"question": _question(n), "answer": _answer(n)},
    "text": lambda n: {"text": f"{_question(n)} {_answer(n)}"},
}
_NESTED = ("messages", "sharegpt")


def _json_lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=row_has_surrogate(row)).encode() + b"\n" for row in rows)


def row_has_surrogate(row: object) -> bool:
    """Whether a row can only be written with escapes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _cells(rows: Rows, delimiter: str) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        values = (row.get(name) for name in names)
        writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in values])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _table(rows: Rows) -> Any:
    """As pyarrow takes it, or every value as text where it does not."""
    if not _is_mixed(rows):
        return pa.Table.from_pylist(rows)
    names = dict.fromkeys(str(name).encode(errors="replace").decode() for row in rows for name in row)
    return pa.Table.from_pylist([{name: json.dumps(row.get(name)) for name in names} for row in rows])


def _is_mixed(rows: Rows) -> bool:
    """Whether a file with columns can hold these rows only as texts."""
    try:
        pq.write_table(pa.Table.from_pylist(rows), pa.BufferOutputStream())
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError, AttributeError):
        return True
    return False


def _parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(rows), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _arrow(rows: Rows) -> bytes:
    table, sink = _table(rows), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


_WRITERS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": _json_lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: _cells(rows, ","),
    ".tsv": lambda rows: _cells(rows, "\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
_PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}
_PACKERS[".xz"] = lzma.compress
_KINDS = [".jsonl"] * 5 + [".csv"] * 4 + [".parquet"] * 3 + [".json", ".json", ".tsv", ".arrow", ".txt"]


def _count(kind: str, raw: bytes) -> int:
    """How many rows a file holds, counted by itself.

    Raises:
        ValueError: that cannot be told.
    """
    if kind == ".jsonl":
        return sum(bool(line.strip(b" \t\r\n")) for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    if kind == ".json":
        return _count_json(raw.decode("utf-8-sig"))
    if kind in (".csv", ".tsv"):
        text = io.StringIO(raw.decode("utf-8-sig"), newline="")
        records = csv.reader(text, delimiter="," if kind == ".csv" else "\t")
        return sum(bool(record) for record in records) - 1
    if kind == ".txt":
        return int(bool(raw.decode("utf-8-sig").strip()))
    try:
        if kind == ".parquet":
            return int(pq.ParquetFile(io.BytesIO(raw)).metadata.num_rows)
        with pa.ipc.open_file(io.BytesIO(raw)) as file:
            return sum(file.get_batch(index).num_rows for index in range(file.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error


def _count_json(text: str) -> int:
    # Files that were joined have byte order marks between values, which are read over.
    text = re.sub(r'("(?:[^"\\]|\\.)*")|\ufeff', lambda found: found[1] or "", text, flags=re.DOTALL)
    decoder, at, many = json.JSONDecoder(parse_int=str), 0, 0
    while at < len(text.rstrip()):
        at += len(text[at:]) - len(text[at:].lstrip())
        value, at = decoder.raw_decode(text, at)
        many += len(value) if isinstance(value, list) else 1
    return many


def _prepare(folder: Path) -> Any:
    return make_tokenizer()


def _run(tokenizer: Any, chance: random.Random, place: Path, number: int) -> str:
    kind, name = chance.choice(_KINDS), chance.choice(list(_FORMATS))
    if kind in (".csv", ".tsv") and name in _NESTED:
        name = "prompt-completion"
    packer = chance.choice(["", "", "", "", ".gz", ".bz2", ".xz"]) if kind not in (".parquet", ".arrow", ".txt") else ""
    rows = [_FORMATS[name](number) for number in chance.sample(range(1000), chance.randint(2, 10))]
    untouched = list(rows)
    way = chance.random()
    if way < 0.6:
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(rows))
            value = mutate_value(chance, rows[at])
            rows[at] = value if isinstance(value, dict) or kind in (".jsonl", ".json") else {"text": value}
        told = kind in (".jsonl", ".json", ".txt") or not _is_mixed(rows)
        untouched = [row for row in untouched if told and row in rows]
    raw = _WRITERS[kind](rows) if kind != ".txt" else str(rows).encode("utf-8", "surrogatepass")
    if way > 0.5:
        raw = mutate_bytes(chance, raw)
        untouched = _untouched(kind, raw, untouched)
    packed = _PACKERS[packer](raw)
    if packer and chance.random() < 0.3:
        packed = mutate_bytes(chance, packed)
    file = place / f"rows{kind}{packer}"
    file.write_bytes(packed)
    settings = _settings(chance, file, name)
    (place / "settings.json").write_text(json.dumps(settings, default=str), encoding="utf-8")
    return _prepared(tokenizer, settings, kind, raw if packed == _PACKERS[packer](raw) else None, untouched)


def _untouched(kind: str, raw: bytes, rows: Rows) -> Rows:
    """The rows that still stand in a file whose bytes were damaged; told for JSON Lines alone."""
    lines = set(raw.split(b"\n")) if kind == ".jsonl" else set()
    return [row for row in rows if _json_lines([row]).rstrip(b"\n") in lines]


def _settings(chance: random.Random, file: Path, name: str) -> dict[str, Any]:
    return {
        "train": str(file),
        "eval": chance.choice([None, None, 0.3]),
        "format": chance.choice(["auto", name, name]),
        "broken": chance.choice(["drop", "drop", "drop", "error"]),
        "overlong": chance.choice(["drop", "truncate", "split", "error"]),
        "max_length": chance.choice([60, 200]),
        "clean": dict.fromkeys(("encoding", "noise", "html"), chance.choice(["report", "fix"])),
    }


def _prepared(tokenizer: Any, settings: dict[str, Any], kind: str, raw: bytes | None, untouched: Rows) -> str:
    data = Data(**{**settings, "clean": Clean(**settings["clean"])})
    template = ChatTemplate(tokenizer, "assistant", None, (_STOP,))
    try:
        sides = [side for side in examples_of(data, template, Silent()) if side]
    except UserError as error:
        if not str(error).strip():
            raise BrokenPromiseError("an empty message") from error
        return "refused"
    reports = [side.report for side in sides]
    for side in sides:
        owners = len(np.unique(side.index.owner))
        if owners != side.report.used or len(side.rows) != side.report.examples:
            raise BrokenPromiseError(f"{owners} rows have examples, {side.report.used} are said to")
    read = sum(report.read for report in reports)
    if raw is not None:
        try:
            expected = _count(kind, raw)
        except (ValueError, csv.Error) as error:
            raise BrokenPromiseError(f"{read} rows read of a file that is none: {error}") from error
        if read != expected:
            raise BrokenPromiseError(f"{expected} rows in the file, {read} accounted for")
    dropped = sum(report.dropped.total for report in reports)
    _check_answers(tokenizer, data, sides, untouched)
    return "trained, some dropped" if dropped else "trained"


def _check_answers(tokenizer: Any, data: Data, sides: list[Any], untouched: Rows) -> None:
    """Each row that nobody damaged is trained, and what is trained of it is its answer up to its end."""
    if data.format in ("auto", "text") or data.max_length < 200:
        return
    trained = set()
    for side in sides:
        for row in side.rows:
            ids = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
            trained.add(tokenizer.decode(ids))
    for row in untouched:
        answer = next(word for word in _texts(row) if word.startswith('{"topic"'))
        if not any(text.startswith(answer + _STOP) for text in trained):
            raise BrokenPromiseError(f"an undamaged row is not trained as its answer: {answer!r} of {sorted(trained)}")


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


PART = Part("rows", 5000, _prepare, _run, seconds=30, memory=3 << 30)
