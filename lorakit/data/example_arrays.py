"""Encoded examples as arrays: what a worker hands back of one block of rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.data.conversations import IGNORED, Encoded

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "answer": pa.int32(),
        "where": pa.string(),
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


class ExampleArrays:
    """The examples of a block as they are made, on their way into arrays."""

    def __init__(self) -> None:
        self.examples: list[Encoded] = []
        self.where: list[str] = []
        self.owner: list[int] = []
        self.cut: list[bool] = []
        self._lengths: list[tuple[int, int, int]] = []
        self._ends: list[tuple[int, int]] = []

    def add_row(self, examples: list[Encoded], cut: bool, where: str) -> None:
        """A usable row with its examples."""
        self.examples += examples
        self.where += [where] * len(examples)
        self.owner += [len(self.cut)] * len(examples)
        self.cut.append(cut)

    def add_lengths(self, text: Encoded) -> None:
        """A text, fitting or not."""
        start = trained = 0
        for _, end in text.turns:
            trained += count_trained(text.labels[start:end])
            self._ends.append((end, trained))
            start = end
        self._lengths.append((len(text.input_ids), count_trained(text.labels), len(text.turns)))

    def to_batch(self, source: int) -> pa.RecordBatch:
        offsets = pa.array(np.cumsum([0, *(len(one.input_ids) for one in self.examples)]), pa.int32())
        lists = []
        for rows in ([one.input_ids for one in self.examples], [one.labels for one in self.examples]):
            numbers: Any = np.concatenate([np.array(row, dtype=np.int32) for row in rows]) if rows else []
            lists.append(pa.ListArray.from_arrays(offsets, pa.array(numbers, pa.int32())))
        answers = pa.array([one.turns[-1][0] if one.turns else -1 for one in self.examples], pa.int32())
        number = pa.array(np.full(len(self.where), source), pa.int16())
        return pa.RecordBatch.from_arrays([*lists, answers, pa.array(self.where, pa.string()), number], schema=SCHEMA)

    def text_lengths(self) -> TextLengths:
        lengths = np.array(self._lengths, dtype=np.int64).reshape(-1, 3).T
        return TextLengths(*lengths, *np.array(self._ends, dtype=np.int64).reshape(-1, 2).T)


def count_trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)
