"""The cached form of examples: an Arrow file for each side of the split, and arrays and a report beside it."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lorakit.atomic_io import cache_folder
from lorakit.data.cleaning.row_stats import RowStats
from lorakit.data.made import TextLengths
from lorakit.data.mixture import Mixture
from lorakit.data.pipeline import PipelineResult
from lorakit.data.report import Report

SIDES = ("train", "held_out")
_AT_ONCE = 10_000


@dataclass(frozen=True)
class ExampleIndex:
    """Of each example: its row, its tokens, how many of them are trained, and the number of its source."""

    owner: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    source: np.ndarray

    def of(self, examples: np.ndarray, rows: np.ndarray) -> "ExampleIndex":
        """Those of some examples (a mask), whose rows (a mask) are counted anew."""
        counted = np.cumsum(rows) - 1
        return ExampleIndex(
            counted[self.owner[examples]], self.length[examples], self.trained[examples], self.source[examples]
        )


@dataclass(frozen=True)
class Examples:
    """`rows` has the columns input_ids, labels (-100 where not trained), answer (the token index at which the last
    answer begins, -1 where a text has none), where (file and line) and source (its number).

    `numbers` of each example; `traits` of each row, where they were asked for.
    """

    rows: datasets.Dataset
    report: Report
    key: str
    numbers: ExampleIndex
    traits: RowStats | None = None

    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self.numbers.length

    def largest_token(self) -> int:
        """The largest token id."""
        ids = self.rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        return max(pc.max(pc.list_flatten(chunk)).as_py() for chunk in ids.chunks if len(chunk))

    def tokens_sha256(self) -> str:
        """The sha256 of every example's tokens and labels, in order."""
        digest = hashlib.sha256(self.numbers.length.astype("<i8").tobytes())
        columns = self.rows.select_columns(["input_ids", "labels"]).with_format("arrow")
        for batch in columns.iter(_AT_ONCE):
            for name in ("input_ids", "labels"):
                for chunk in batch[name].chunks:
                    digest.update(pc.list_flatten(chunk).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """The place of a row."""
        return str(self.rows[int(np.searchsorted(self.numbers.owner, row))]["where"])

    @property
    def mixture(self) -> Mixture:
        """How many examples each source has, and how often they are drawn."""
        sources = self.report.sources
        counts = np.bincount(self.numbers.source, minlength=len(sources)).tolist()
        return Mixture(tuple(counts), tuple(source.weight for source in sources))


def _traits(arrays: dict[str, np.ndarray]) -> RowStats:
    return RowStats(**{field.name: arrays.get(field.name) for field in fields(RowStats)})  # type: ignore[arg-type]


def write_side(folder: Path, side: str, gathered: PipelineResult, rows: np.ndarray, report: Report) -> None:
    """Write the examples of the chosen rows (a mask) and what belongs to them."""
    chosen = rows[gathered.owner]
    target = folder / f"{side}.arrow"
    # Read, not mapped: pages of a map would count as this process's memory.
    with pa.OSFile(str(gathered.path)) as source, pa.OSFile(str(target), "wb") as file:
        stream = pa.ipc.open_stream(source)
        with pa.ipc.new_stream(file, stream.schema) as writer:
            start = 0
            for batch in stream:
                mask = chosen[start : start + len(batch)]
                start += len(batch)
                if mask.any():
                    writer.write_batch(batch if mask.all() else batch.filter(pa.array(mask)))
    numbers = np.cumsum(rows) - 1
    arrays: dict[str, Any] = {
        "owner": numbers[gathered.owner[chosen]],
        "length": gathered.length[chosen],
        "trained": gathered.trained[chosen],
        "source": gathered.source[gathered.owner[chosen]],
    }
    if gathered.traits is not None:
        arrays |= {f"of_{name}": array[rows] for name, array in vars(gathered.traits).items() if array is not None}
    np.savez(folder / f"{side}.npz", **arrays)
    (folder / f"{side}.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")


def read_shapes(key: str) -> TextLengths:
    """The lengths of every text of a cached set, fitting or not."""
    with np.load(cache_folder() / "examples" / key / "shapes.npz", allow_pickle=False) as arrays:
        return TextLengths(**arrays)


def read_side(folder: Path, side: str, key: str) -> Examples:
    """The examples of one side.

    Raises:
        OSError, ValueError, TypeError, KeyError: the files are damaged.
    """
    report = Report.from_dict(json.loads((folder / f"{side}.json").read_text(encoding="utf-8")))
    try:
        rows = datasets.Dataset.from_file(str(folder / f"{side}.arrow"))
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    if len(rows) != report.examples:
        raise ValueError(f"{len(rows)} of {report.examples} examples")
    with np.load(folder / f"{side}.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    traits = {name.removeprefix("of_"): found.pop(name) for name in list(found) if name.startswith("of_")}
    numbers = ExampleIndex(**found)
    if len(numbers.owner) != len(rows):
        raise ValueError(f"{len(numbers.owner)} of {len(rows)} places")
    return Examples(rows, report, key, numbers, _traits(traits) if traits else None)
