"""Gathering: every row of a recipe's sources, worked on in several processes, into one Arrow file and some arrays."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.cleaning.row_stats import RowStats, RowStatsBuilder
from lorakit.data.conversations import Text
from lorakit.data.made import SCHEMA, TextLengths
from lorakit.data.report import Report, SourceReport
from lorakit.data.rows import Block
from lorakit.data.sources import OpenSource, open_source, source_name
from lorakit.data.worker import BlockResult, Rules, Task, Worker
from lorakit.data.worker_pool import map_in_order, processors
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.problem import one_line
from lorakit.recipe.schema import Source

# Below this many bytes of rows, starting more processes takes longer than they save.
_WORTHWHILE = 1 << 20
_EVERY = 2**64 - 1


@dataclass
class PipelineResult:
    """The usable rows of all sources, in order, and their examples, in the Arrow file `path`.

    Of each row: `source`, `digests` (its sha256 as four numbers), `cut`, and `traits` where they were wanted. Of each
    example: `owner` (its row), `length` and `trained`, in tokens. `reports` count what became no example, on the
    trained and on the held-out side. `notes`: what is to be said of how rows are trained, and of which.
    """

    path: Path
    opened: list[OpenSource]
    source: np.ndarray
    digests: np.ndarray
    cut: np.ndarray
    traits: RowStats | None
    owner: np.ndarray
    length: np.ndarray
    trained: np.ndarray
    shapes: TextLengths
    reports: tuple[Report, Report]
    stops: Counter[str]
    rows: int
    notes: dict[str, np.ndarray]

    def where(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The places of some rows."""
        first = np.searchsorted(self.owner, np.asarray(rows))
        wanted: dict[int, str] = dict.fromkeys(first.tolist(), "")
        start = 0
        with pa.memory_map(str(self.path)) as file:
            for batch in pa.ipc.open_stream(file):
                inside = [number for number in wanted if start <= number < start + len(batch)]
                places = batch.column("where")
                wanted |= {number: places[number - start].as_py() for number in inside}
                start += len(batch)
        return [wanted[number] for number in first.tolist()]


def run_pipeline(
    sources: Sequence[Source], template: ChatTemplate, rules: Rules, path: Path, progress: Progress
) -> PipelineResult:
    """Read, render and encode every row of `sources`; the examples go into the Arrow file `path`.

    Raises:
        UserError: a source cannot be read or has no rows, or a row is broken or overlong and the recipe says to stop.
    """
    opened = [open_source(source) for source in sources]
    tasks = [
        Task(one.format, one.settings, one.source.columns or {}, replace(template, system=one.source.system), one.flags)
        for one in opened
    ]
    takes = [_Take(one.source.take) for one in opened]
    size = sum(one.size for one in opened)
    worker = Worker(tasks, rules)
    worker.get_ready()
    merged, sent = _Collector(len(opened)), deque[tuple[int, int, str]]()
    for system in sorted({one.source.system for one in opened if one.source.system}):
        _look_into_system_prompt(system, template, rules, merged.reports[0])
    label = f"reading {source_name(opened[0].source)}" + (f" and {len(opened) - 1} more" if len(opened) > 1 else "")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
        progress.bar(label, total=size, unit="bytes") as bar,
        closing(
            map_in_order(worker, _pieces(opened, takes, sent), processors() if size > _WORTHWHILE else 1)
        ) as results,
    ):
        for worked in results:
            number, done, name = sent.popleft()
            merged.rows_in[name] += worked.rows
            writer.write_batch(worked.examples)
            takes[number].seen(worked.digests)
            merged.add(number, worked)
            bar.advance(done, f"{merged.rows:,} rows")
    for number, one in enumerate(opened):
        if not merged.rows_of[number]:
            raise UserError(f"{source_name(one.source)}: no rows. A source needs at least one.")
        one.refuse_late_preference_pairs(merged.filled_of[number])
        one.refuse_missing(merged.columns_of[number])
        one.add_unused_columns(merged.filled_of[number])
        empty = [name for name in one.files if not merged.rows_in[name]]
        if empty:
            one.why += f"; no rows in {one_line(', '.join(empty), 300)}"
    return merged.gathered(path, opened)


def _look_into_system_prompt(system: str, template: ChatTemplate, rules: Rules, report: Report) -> None:
    """What of the recipe's own system prompt the model would not read as text.

    Raises:
        UserError: it ends a turn or begins a sequence, or it spells a special token and the recipe says to stop.
    """
    for mark in sorted(template.marks):
        if mark in system:
            raise UserError(
                f"data.system: it contains the text {mark!r}, with which a turn of this model ends or a sequence "
                "begins. Take it out."
            )
    action = rules.checks.get("special_tokens", "off")
    for what, _ in template.controls.spelled(Text(system)) if action != "off" else ():
        if action == "error":
            raise UserError(f"data.system: {what}. Take it out, or write data.clean.special_tokens: report.")
        report.findings.add(f"special_tokens: {what}", "data.system")


def _pieces(
    opened: list[OpenSource], takes: "list[_Take]", sent: deque[tuple[int, int, str]]
) -> Iterator[tuple[int, Block, int]]:
    """What a worker is given, block by block; the source and size of each go to `sent`."""
    for number, one in enumerate(opened):
        for block in one.blocks:
            sent.append((number, block.size, block.name))
            yield number, block, takes[number].ceiling


class _Take:
    """Which rows a source's `take` lets through: the share, or that many, whose number by content is lowest."""

    def __init__(self, take: float | int | None) -> None:
        self.many = take if isinstance(take, int) else None
        self.ceiling = int(take * 2**64) if isinstance(take, float) else _EVERY
        self.lowest = np.zeros(0, dtype=np.uint64)

    def seen(self, digests: np.ndarray) -> None:
        """Once enough rows are known, those with a higher number need not be worked on."""
        if self.many is None:
            return
        self.lowest = np.concatenate([self.lowest, digests[:, 1]])
        if len(self.lowest) > self.many:
            self.lowest = np.partition(self.lowest, self.many - 1)[: self.many]
            self.ceiling = int(self.lowest.max())


class _Collector:
    """The results of all blocks, put together."""

    def __init__(self, sources: int) -> None:
        self.worked: list[BlockResult] = []
        self.source_of: list[int] = []
        self.rows = 0
        self.rows_of = [0] * sources
        self.traits = RowStatsBuilder()
        self.rows_in = Counter[str]()
        self.filled_of = [set[str]() for _ in range(sources)]
        self.columns_of = [set[str]() for _ in range(sources)]
        self.reports, self.stops = (Report(), Report()), Counter[str]()

    def add(self, source: int, worked: BlockResult) -> None:
        self.rows += worked.rows
        self.rows_of[source] += worked.rows
        self.columns_of[source] |= worked.columns
        self.filled_of[source] |= worked.filled
        self.stops += worked.stops
        for mine, theirs in zip(self.reports, worked.reports, strict=True):
            mine.passed_over += theirs.passed_over
            mine.dropped.merge(theirs.dropped)
            mine.findings.merge(theirs.findings)
        worked.examples = None  # they are on disk
        if worked.traits is not None:
            self.traits.add(worked.traits)
            worked.traits = None
        self.worked.append(worked)
        self.source_of.append(source)

    def gathered(self, path: Path, opened: list[OpenSource]) -> PipelineResult:
        counts = [len(worked.digests) for worked in self.worked]
        firsts = np.concatenate(([0], np.cumsum(counts)))
        owners = [worked.owner + first for worked, first in zip(self.worked, firsts, strict=False)]
        return PipelineResult(
            path=path,
            opened=opened,
            source=np.repeat(np.array(self.source_of, dtype=np.int16), counts),
            digests=_joined([worked.digests for worked in self.worked], (0, 4), np.uint64),
            cut=_joined([worked.cut for worked in self.worked], (0,), bool),
            traits=self.traits.joined(),
            owner=_joined(owners, (0,), np.int64),
            length=_joined([worked.lengths for worked in self.worked], (0,), np.int64),
            trained=_joined([worked.trained for worked in self.worked], (0,), np.int64),
            shapes=_joined_shapes([worked.shapes for worked in self.worked]),
            reports=self.reports,
            stops=self.stops,
            rows=self.rows,
            notes=_joined_notes(self.worked, firsts),
        )


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], kind: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty, dtype=kind)


def _joined_notes(worked: list[BlockResult], firsts: np.ndarray) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    for block, first in zip(worked, firsts, strict=False):
        for note, numbers in block.notes.items():
            found.setdefault(note, []).append(numbers + first)
    return {note: np.concatenate(numbers) for note, numbers in found.items()}


def _joined_shapes(parts: list[TextLengths]) -> TextLengths:
    names = [field.name for field in fields(TextLengths)]
    return TextLengths(*(_joined([getattr(part, name) for part in parts], (0,), np.int64) for name in names))


def source_reports(opened: list[OpenSource]) -> list[SourceReport]:
    """A report for each source, nothing counted yet."""
    return [
        SourceReport(source_name(one.source), one.format, one.why, one.source.task, one.source.weight) for one in opened
    ]
