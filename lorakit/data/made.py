"""Examples on their way from lists into arrays: what a worker hands back of one block of rows."""

from dataclasses import dataclass, field

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


@dataclass
class BlockExamples:
    """The examples of a block as they are made, on their way into arrays."""

    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    answers: list[int] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    shaped: list[tuple[int, int, int]] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)

    def add(self, owner: int, fitted: tuple[list[Encoded], bool], where: str) -> None:
        examples, cut = fitted
        self.cut.append(cut)
        for example in examples:
            self.ids.append(np.array(example.input_ids, dtype=np.int32))
            self.labels.append(np.array(example.labels, dtype=np.int32))
            self.offsets.append(self.offsets[-1] + len(example.input_ids))
            self.answers.append(example.turns[-1][0] if example.turns else -1)
            self.trained.append(_trained(example.labels))
            self.where.append(where)
            self.owner.append(owner)

    def shape(self, example: Encoded) -> None:
        start = trained = 0
        for _, end in example.turns:
            trained += _trained(example.labels[start:end])
            self.ends.append((end, trained))
            start = end
        self.shaped.append((len(example.input_ids), _trained(example.labels), len(example.turns)))

    def batch(self, source: int) -> pa.RecordBatch:
        offsets = pa.array(self.offsets, pa.int32())
        lists = [pa.ListArray.from_arrays(offsets, _flat(rows)) for rows in (self.ids, self.labels)]
        answers, where = pa.array(self.answers, pa.int32()), pa.array(self.where, pa.string())
        return pa.RecordBatch.from_arrays(
            [*lists, answers, where, pa.array(np.full(len(self.where), source), pa.int16())], schema=SCHEMA
        )

    def shapes(self) -> TextLengths:
        shaped = np.array(self.shaped, dtype=np.int64).reshape(-1, 3).T
        ends = np.array(self.ends, dtype=np.int64).reshape(-1, 2).T
        return TextLengths(*shaped, *ends)


def _flat(rows: list[np.ndarray]) -> pa.Array:
    return pa.array(np.concatenate(rows) if rows else [], pa.int32())


def _trained(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)
