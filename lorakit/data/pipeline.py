"""The pipeline: every row of a recipe's sources through the workers, into one Arrow file and some arrays."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.cleaning.row_stats import RowStats, join_row_stats
from lorakit.data.conversations import Text
from lorakit.data.example_arrays import SCHEMA, TextLengths
from lorakit.data.report import Report
from lorakit.data.rows import Block
from lorakit.data.sources import OpenSource, open_source, source_name
from lorakit.data.worker import EVERY_ROW, BlockResult, Rules, Worker, task_of
from lorakit.data.worker_pool import map_in_order, processors
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.problem import one_line
from lorakit.recipe.schema import Source

# Below this many bytes of rows, starting more processes takes longer than they save.
_WORTHWHILE = 1 << 20


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
    text_lengths: TextLengths
    reports: tuple[Report, Report]
    stops: Counter[str]
    notes: dict[str, np.ndarray]

    def where(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The places of some rows."""
        first = np.searchsorted(self.owner, np.asarray(rows)).tolist()
        places: dict[int, str] = dict.fromkeys(first, "")
        start = 0
        with pa.memory_map(str(self.path)) as file:
            for batch in pa.ipc.open_stream(file):
                column = batch.column("where")
                inside = [number for number in places if start <= number < start + len(batch)]
                places |= {number: column[number - start].as_py() for number in inside}
                start += len(batch)
        return [places[number] for number in first]


def run_pipeline(
    sources: Sequence[Source], template: ChatTemplate, rules: Rules, path: Path, progress: Progress
) -> PipelineResult:
    """Read, render and encode every row of `sources`; the examples go into the Arrow file `path`.

    Raises:
        UserError: a source cannot be read or has no rows, or a row is broken or overlong and the recipe says to stop.
    """
    opened = [open_source(source) for source in sources]
    takes = [_Take(one.source.take) for one in opened]
    size = sum(one.size for one in opened)
    worker = Worker([task_of(one, template) for one in opened], rules)
    worker.get_ready()
    collector, sent = _Collector(opened), deque[tuple[int, int, str]]()

    def pieces() -> Iterator[tuple[int, Block, int]]:
        for number, one in enumerate(opened):
            for block in one.blocks:
                sent.append((number, block.size, block.name))
                yield number, block, takes[number].ceiling

    for system in sorted({one.source.system for one in opened if one.source.system}):
        _check_system_prompt(system, template, rules, collector.reports[0])
    label = f"reading {source_name(opened[0].source)}" + (f" and {len(opened) - 1} more" if len(opened) > 1 else "")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
        progress.bar(label, total=size, unit="bytes") as bar,
        closing(map_in_order(worker, pieces(), processors() if size > _WORTHWHILE else 1)) as results,
    ):
        for result in results:
            number, done, name = sent.popleft()
            writer.write_batch(result.examples)
            takes[number].add(result.digests)
            collector.add(number, name, result)
            bar.advance(done, f"{sum(collector.rows_of):,} rows")
    collector.check_sources()
    return collector.result(path)


def _check_system_prompt(system: str, template: ChatTemplate, rules: Rules, report: Report) -> None:
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


class _Take:
    """Which rows a source's `take` lets through: the share, or that many, whose number by content is lowest."""

    def __init__(self, take: float | int | None) -> None:
        self.most = take if isinstance(take, int) else None
        self.ceiling = int(take * 2**64) if isinstance(take, float) else EVERY_ROW
        self.lowest = np.zeros(0, dtype=np.uint64)

    def add(self, digests: np.ndarray) -> None:
        """Once enough rows are known, those with a higher number need not be worked on."""
        if self.most is None:
            return
        self.lowest = np.concatenate([self.lowest, digests[:, 1]])
        if len(self.lowest) > self.most:
            self.lowest = np.partition(self.lowest, self.most - 1)[: self.most]
            self.ceiling = int(self.lowest.max())


class _Collector:
    """The results of all blocks, put together."""

    def __init__(self, opened: list[OpenSource]) -> None:
        self.opened = opened
        self.results: list[tuple[int, BlockResult]] = []
        self.traits: list[dict[str, Any]] = []
        self.rows_in = Counter[str]()
        """Rows of each file."""
        self.rows_of = [0] * len(opened)
        self.filled_of = [set[str]() for _ in opened]
        self.columns_of = [set[str]() for _ in opened]
        self.reports, self.stops = (Report(), Report()), Counter[str]()

    def add(self, source: int, file: str, result: BlockResult) -> None:
        self.rows_in[file] += result.rows
        self.rows_of[source] += result.rows
        self.columns_of[source] |= result.columns
        self.filled_of[source] |= result.filled
        self.stops += result.stops
        for mine, theirs in zip(self.reports, result.reports, strict=True):
            mine.passed_over += theirs.passed_over
            mine.dropped.merge(theirs.dropped)
            mine.findings.merge(theirs.findings)
        if result.traits is not None:
            self.traits.append({**vars(result.traits)})
        result.examples = result.traits = None  # on disk, and in `self.traits`
        self.results.append((source, result))

    def check_sources(self) -> None:
        """What can be said of a source once all its rows have been read.

        Raises:
            UserError: it has no rows, or columns that it must not have, or not those that the recipe names.
        """
        for number, one in enumerate(self.opened):
            if not self.rows_of[number]:
                raise UserError(f"{source_name(one.source)}: no rows. A source needs at least one.")
            one.check_all_rows(self.columns_of[number], self.filled_of[number])
            empty = [name for name in one.files if not self.rows_in[name]]
            if empty:
                one.why += f"; no rows in {one_line(', '.join(empty), 300)}"

    def result(self, path: Path) -> PipelineResult:
        results = [result for _, result in self.results]
        counts = [len(result.digests) for result in results]
        firsts = np.concatenate(([0], np.cumsum(counts)))[:-1]
        notes: dict[str, list[np.ndarray]] = {}
        for result, first in zip(results, firsts, strict=True):
            for note, numbers in result.notes.items():
                notes.setdefault(note, []).append(numbers + first)
        lengths = [result.text_lengths for result in results]
        names = [field.name for field in fields(TextLengths)]
        return PipelineResult(
            path=path,
            opened=self.opened,
            source=np.repeat(np.array([source for source, _ in self.results], dtype=np.int16), counts),
            digests=_join([result.digests for result in results], np.uint64, (0, 4)),
            cut=_join([result.cut for result in results], bool),
            traits=join_row_stats(self.traits),
            owner=_join([result.owner + first for result, first in zip(results, firsts, strict=True)]),
            length=_join([result.lengths for result in results]),
            trained=_join([result.trained for result in results]),
            text_lengths=TextLengths(*(_join([getattr(part, name) for part in lengths]) for name in names)),
            reports=self.reports,
            stops=self.stops,
            notes={note: np.concatenate(numbers) for note, numbers in notes.items()},
        )


def _join(parts: list[np.ndarray], kind: Any = np.int64, empty: tuple[int, ...] = (0,)) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty, dtype=kind)
