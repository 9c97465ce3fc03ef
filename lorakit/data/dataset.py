"""Examples on disk: an Arrow file for each side of the split, and arrays and a report beside it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lorakit.data.cleaning.row_stats import RowStats
from lorakit.data.example_arrays import TextLengths, UsableRows, to_arrow
from lorakit.data.mixture import Mixture
from lorakit.data.report import Report

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("train", "held_out")


@dataclass(frozen=True)
class ExampleIndex:
    """Of each example: its row, its tokens, how many of them are trained, and the number of its source."""

    owner: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    source: np.ndarray

    def select(self, examples: np.ndarray, rows: np.ndarray) -> "ExampleIndex":
        """Those of some examples (a mask), whose rows (a mask) are counted anew."""
        owner = (np.cumsum(rows) - 1)[self.owner[examples]]
        return ExampleIndex(owner, self.length[examples], self.trained[examples], self.source[examples])


@dataclass(frozen=True)
class Examples:
    """The examples of one side: all of an Arrow `file`, or those whose numbers are `selected`.

    `traits` of each row, and `text_lengths` of both sides, fitting or not, where they were asked for.
    """

    file: Path
    report: Report
    key: str
    index: ExampleIndex
    traits: RowStats | None = None
    text_lengths: TextLengths | None = None
    selected: np.ndarray | None = None

    @cached_property
    def rows(self) -> "Dataset":
        """The columns input_ids, labels (-100 where not trained), answer (the token index at which the last answer
        begins, -1 where a text has none), where (file and line), task (its tag, or nothing) and source (its number)."""
        from datasets import Dataset  # takes half a second, which a plan does not need

        rows = Dataset.from_file(str(self.file))
        return rows if self.selected is None else rows.select(self.selected)

    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self.index.length

    def largest_token(self) -> int:
        """The largest token id."""
        return max(pc.max(ids).as_py() for ids in self._flat_columns("input_ids"))

    def tokens_sha256(self) -> str:
        """The sha256 of every example's tokens and labels, in order."""
        digest = hashlib.sha256(self.index.length.astype("<i8").tobytes())
        for numbers in self._flat_columns("input_ids", "labels"):
            digest.update(numbers.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        return digest.hexdigest()

    def _flat_columns(self, *names: str) -> Iterator[pa.Array]:
        for batch in self.rows.select_columns(list(names)).with_format("arrow").iter(10_000):
            for name in names:
                yield from (pc.list_flatten(chunk) for chunk in batch[name].chunks)

    def where(self, row: int) -> str:
        """The place of a row."""
        return str(self.rows[int(np.searchsorted(self.index.owner, row))]["where"])

    @property
    def mixture(self) -> Mixture:
        """How many examples each source has, and how often they are drawn."""
        sources = self.report.sources
        return Mixture(tuple(one.examples for one in sources), tuple(one.weight for one in sources))


def count_examples(report: Report, index: ExampleIndex) -> None:
    """Set what a report says of the examples that are left: counts of each source, their sums, the longest."""
    for number, source in enumerate(report.sources):
        own = index.source == number
        source.used, source.examples = len(np.unique(index.owner[own])), int(own.sum())
        source.tokens, source.trained_tokens = int(index.length[own].sum()), int(index.trained[own].sum())
    report.used = sum(source.used for source in report.sources)
    report.examples = sum(source.examples for source in report.sources)
    report.tokens = sum(source.tokens for source in report.sources)
    report.trained_tokens = sum(source.trained_tokens for source in report.sources)
    report.longest = int(index.length.max(initial=0))


def write_side(folder: Path, side: str, result: UsableRows, rows: np.ndarray, report: Report) -> None:
    """Write the examples of some rows (a mask) and what belongs to them."""
    chosen = rows[result.owner]
    # Read, not mapped: pages of a map would count as this process's memory.
    with pa.OSFile(str(result.path)) as source, pa.OSFile(str(folder / f"{side}.arrow"), "wb") as file:
        stream = pa.ipc.open_stream(source)
        with pa.ipc.new_stream(file, stream.schema) as writer:
            start = 0
            for batch in stream:
                mask = chosen[start : start + len(batch)]
                start += len(batch)
                if mask.any():
                    writer.write_batch(batch if mask.all() else batch.filter(to_arrow(mask)))
    arrays = vars(index_of(result).select(chosen, rows))
    if result.traits is not None:
        arrays |= {f"of_{name}": array[rows] for name, array in vars(result.traits).items() if array is not None}
    np.savez(folder / f"{side}.npz", **arrays)
    (folder / f"{side}.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")


def index_of(result: UsableRows) -> ExampleIndex:
    """The examples of all rows."""
    return ExampleIndex(result.owner, result.length, result.trained, result.source[result.owner])


def read_side(folder: Path, side: str, key: str) -> Examples:
    """The examples of one side.

    Raises:
        OSError, ValueError, TypeError, KeyError: the files are damaged.
    """
    report = Report.from_dict(json.loads((folder / f"{side}.json").read_text(encoding="utf-8")))
    path = folder / f"{side}.arrow"
    try:
        with pa.memory_map(str(path)) as file:
            count = sum(map(len, pa.ipc.open_stream(file)))
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    if count != report.examples:
        raise ValueError(f"{count} of {report.examples} examples")
    with np.load(folder / f"{side}.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    traits = {field.name: arrays.pop(f"of_{field.name}", None) for field in fields(RowStats)}
    index = ExampleIndex(**arrays)
    if len(index.owner) != count:
        raise ValueError(f"{len(index.owner)} of {count} places")
    return Examples(path, report, key, index, None if traits["content"] is None else RowStats(**traits))
