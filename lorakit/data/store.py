"""The cached form of examples: an Arrow file for each side of the split, and arrays and a report beside it."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lorakit.data.encoding import IGNORED
from lorakit.data.gather import Gathered
from lorakit.data.hygiene.traits import TraitArrays
from lorakit.data.made import Shapes
from lorakit.data.report import Report
from lorakit.folders import cache_folder

SIDES = ("train", "held_out")


@dataclass(frozen=True)
class Examples:
    """`rows` has the columns input_ids, labels (-100 where not trained), answer (the token index at which the last
    answer begins, -1 where a text has none), where (file and line) and source (its number).

    `weights`: how often each example is trained in an epoch; None where it is once. `owner` says of each example which
    row it is of, and `digests` what each row says; `traits` are there when they were asked for.
    """

    rows: datasets.Dataset
    report: Report
    key: str
    owner: np.ndarray
    digests: np.ndarray
    traits: TraitArrays | None = None

    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.asarray(pc.list_value_length(self._column("input_ids"))).astype(np.int64)

    def largest_token(self) -> int:
        """The largest token id."""
        return max(pc.max(pc.list_flatten(chunk)).as_py() for chunk in self._column("input_ids").chunks if len(chunk))

    def trained(self) -> np.ndarray:
        """Trained tokens of each example."""
        labels = self._column("labels")
        counts = [
            np.add.reduceat(
                np.append(np.asarray(pc.list_flatten(chunk)) != IGNORED, False),
                np.asarray(chunk.offsets)[:-1] - chunk.offsets[0].as_py(),
            )
            for chunk in labels.chunks
            if len(chunk)
        ]
        return np.concatenate(counts)

    def where(self, row: int) -> str:
        """The place of a row, of which `owner` says what examples are."""
        return str(self.rows[int(np.searchsorted(self.owner, row))]["where"])

    def sources(self) -> np.ndarray:
        """The number of each example's source."""
        return np.asarray(self._column("source"))

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.rows.select_columns(name).with_format("arrow")[:][name]

    @property
    def weights(self) -> np.ndarray | None:
        """How often each example is trained in an epoch; None where each is once."""
        weights = np.array([source.weight for source in self.report.sources])
        return None if (weights == 1).all() else weights[self.sources()]


def _traits(arrays: dict[str, np.ndarray]) -> TraitArrays:
    return TraitArrays(**{field.name: arrays.get(field.name) for field in fields(TraitArrays)})  # type: ignore[arg-type]


def write_side(folder: Path, side: str, gathered: Gathered, rows: np.ndarray, report: Report) -> None:
    """Write the examples of the chosen rows (a mask) and what belongs to them."""
    chosen = rows[gathered.owner]
    target = folder / f"{side}.arrow"
    with pa.memory_map(str(gathered.path)) as source, pa.OSFile(str(target), "wb") as file:
        stream = pa.ipc.open_stream(source)
        with pa.ipc.new_stream(file, stream.schema) as writer:
            start = 0
            for batch in stream:
                mask = chosen[start : start + len(batch)]
                start += len(batch)
                if mask.any():
                    writer.write_batch(batch if mask.all() else batch.filter(pa.array(mask)))
    numbers = np.cumsum(rows) - 1
    arrays: dict[str, Any] = {"owner": numbers[gathered.owner[chosen]], "digests": gathered.digests[rows]}
    if gathered.traits is not None:
        arrays |= {name: array[rows] for name, array in vars(gathered.traits).items() if array is not None}
    np.savez(folder / f"{side}.npz", **arrays)
    (folder / f"{side}.json").write_text(json.dumps(asdict(report)), encoding="utf-8")


def read_shapes(key: str) -> Shapes:
    """The lengths of every text of a cached set, fitting or not."""
    with np.load(cache_folder() / "examples" / key / "shapes.npz", allow_pickle=False) as arrays:
        return Shapes(**arrays)


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
    owner, digests = found.pop("owner"), found.pop("digests")
    if len(owner) != len(rows):
        raise ValueError(f"{len(owner)} of {len(rows)} places")
    return Examples(rows, report, key, owner, digests, _traits(found) if found else None)
