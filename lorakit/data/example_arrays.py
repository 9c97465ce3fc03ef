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
    {"input_ids": _IDS, "labels": _IDS, "answer": pa.int32(), "where": pa.string(), "source": pa.int16()}
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
    `notes`: what is to be said of how rows are trained, and of which. `path`: the Arrow file of the examples of all
    sources."""

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
    stops, notes = Counter[str](), dict[str, list[np.ndarray]]()
    for part, first in zip(parts, firsts, strict=True):
        stops += part.stops
        for note, numbers in part.notes.items():
            notes.setdefault(note, []).append(numbers + first)
        for mine, theirs in zip(reports, part.reports, strict=True):
            mine.merge(theirs)

    def join(name: str, parts: Sequence[Any] = parts) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

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
        notes={note: np.concatenate(numbers) for note, numbers in notes.items()},
        path=path,
    )


def to_batch(examples: list[Encoded], where: list[str], source: int) -> pa.RecordBatch:
    """Examples of one source in the form of `SCHEMA`. `where`: the place of each."""
    offsets = pa.array(np.cumsum([0, *(len(one.input_ids) for one in examples)]), pa.int32())
    lists = []
    for rows in ([one.input_ids for one in examples], [one.labels for one in examples]):
        numbers: Any = np.concatenate([np.array(row, dtype=np.int32) for row in rows]) if rows else []
        lists.append(pa.ListArray.from_arrays(offsets, pa.array(numbers, pa.int32())))
    answers = pa.array([one.turns[-1][0] if one.turns else -1 for one in examples], pa.int32())
    number = pa.array(np.full(len(where), source), pa.int16())
    return pa.RecordBatch.from_arrays([*lists, answers, pa.array(where, pa.string()), number], schema=SCHEMA)


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
