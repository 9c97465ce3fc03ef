"""Usable rows and their examples as arrays: of one block as a worker hands them back, and of all sources."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.data.cleaning.row_stats import RowStats, join_row_stats
from lorakit.data.report import Report
from lorakit.data.rows import IGNORED, Encoded

_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "answer": pa.int32(),
        "where": pa.string(),
        "task": pa.string(),
        "source": pa.int16(),
    }
)


@dataclass
class TextLengths:
    """Every encoded text, before it is held to max_length: its tokens, how many of them are trained, its trained turns
    and, of each turn in turn, how many tokens end with it and how many of these are trained."""

    length: np.ndarray
    trained: np.ndarray
    turns: np.ndarray
    ends: np.ndarray
    trained_by_end: np.ndarray


@dataclass
class UsableRows:
    """The usable rows of a block, or of all sources in order. Of each row: `source`, `digests` (the sha256 of what it
    says, as four numbers), `cut` (it was truncated), and `traits` where wanted. Of each example: `owner` (its row),
    `length` and `trained`, in tokens. `reports` count what became no example, on the trained and on the held-out side.
    `notes`: what is to be said of how rows are trained, and of which; `tasks`: the rows of each tag. `path`: the
    Arrow file of the examples of all sources."""

    source: np.ndarray
    digests: np.ndarray
    cut: np.ndarray
    traits: RowStats | None
    owner: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    text_lengths: TextLengths
    reports: tuple[Report, Report]
    stops: Counter[str]
    notes: dict[str, np.ndarray]
    tasks: dict[str, np.ndarray]
    path: Path = Path()

    def where(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The places of some rows."""
        first = np.searchsorted(self.owner, np.asarray(rows, dtype=np.int64))
        with pa.memory_map(str(self.path)) as file:
            column = pa.ipc.open_stream(file).read_all().column("where")
            return [column[number].as_py() for number in first.tolist()]


def join_rows(parts: list[UsableRows], reports: tuple[Report, Report], path: Path) -> UsableRows:
    """The rows of all blocks in order, whose examples are in `path`; their reports are added to `reports`."""
    firsts = np.cumsum([0, *(len(part.cut) for part in parts)])[:-1]
    stops = Counter[str]()
    for part in parts:
        stops += part.stops
        for mine, theirs in zip(reports, part.reports, strict=True):
            mine.merge(theirs)

    def join(name: str, parts: Sequence[Any] = parts) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def join_numbers(name: str) -> dict[str, np.ndarray]:
        numbers: dict[str, list[np.ndarray]] = {}
        for part, first in zip(parts, firsts, strict=True):
            for word, own in getattr(part, name).items():
                numbers.setdefault(word, []).append(own + first)
        return {word: np.concatenate(of_parts) for word, of_parts in numbers.items()}

    return UsableRows(
        source=join("source"),
        digests=join("digests"),
        cut=join("cut"),
        traits=join_row_stats([vars(part.traits) for part in parts if part.traits]),  # which empties them
        owner=np.concatenate([part.owner + first for part, first in zip(parts, firsts, strict=True)]),
        length=join("length"),
        trained=join("trained"),
        text_lengths=TextLengths(
            *(join(one.name, [part.text_lengths for part in parts]) for one in fields(TextLengths))
        ),
        reports=reports,
        stops=stops,
        notes=join_numbers("notes"),
        tasks=join_numbers("tasks"),
        path=path,
    )


def to_batch(examples: list[Encoded], where: list[str], tasks: list[str], source: int) -> pa.RecordBatch:
    """Examples of one source in the form of `SCHEMA`. `where`: the place of each; `tasks`: its tag, or nothing."""
    count = len(examples)
    starts = _starts([len(one.input_ids) for one in examples])
    lists = []
    for rows in ([one.input_ids for one in examples], [one.labels for one in examples]):
        numbers = np.concatenate([np.zeros(0, np.int32), *(np.array(row, dtype=np.int32) for row in rows)])
        lists.append(pa.Array.from_buffers(_IDS, count, [None, starts], children=[to_arrow(numbers)]))
    answers = to_arrow(np.array([one.turns[-1][0] if one.turns else -1 for one in examples], dtype=np.int32))
    texts = [_to_texts(where), _to_texts(tasks)]
    number = to_arrow(np.full(count, source, dtype=np.int16))
    return pa.RecordBatch.from_arrays([*lists, answers, *texts, number], schema=SCHEMA)


def _to_texts(texts: list[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    buffers = [None, _starts([len(text) for text in encoded]), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def to_arrow(numbers: np.ndarray) -> pa.Array:
    """Numbers, or a mask, as `pa.array` gives them, which imports pandas: 0.3 s in every process."""
    kind, values = pa.from_numpy_dtype(numbers.dtype), numbers
    if kind == pa.bool_():
        values = np.packbits(numbers, bitorder="little")
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(values)])


def _starts(lengths: list[int]) -> pa.Buffer:
    return pa.py_buffer(np.cumsum([0, *lengths], dtype=np.int32))


def measure_texts(texts: list[Encoded]) -> TextLengths:
    """The lengths of texts, fitting or not."""
    lengths, ends = [], []
    for text in texts:
        start = trained = 0
        for _, end in text.turns:
            trained += count_trained(text.labels[start:end])
            ends.append((end, trained))
            start = end
        lengths.append((len(text.input_ids), count_trained(text.labels), len(text.turns)))
    of_texts = np.array(lengths, dtype=np.int64).reshape(-1, 3).T
    return TextLengths(*of_texts, *np.array(ends, dtype=np.int64).reshape(-1, 2).T)


def count_trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)
