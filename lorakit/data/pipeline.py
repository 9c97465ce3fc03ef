"""The pipeline: every row of a recipe's sources through the workers, into one Arrow file and some arrays."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.example_arrays import SCHEMA, UsableRows, join_rows
from lorakit.data.report import Report, SourceReport
from lorakit.data.rows import Block, Text
from lorakit.data.sources import open_source, source_name
from lorakit.data.worker import EVERY_ROW, Rules, Worker
from lorakit.data.worker_pool import map_in_order
from lorakit.errors import UserError
from lorakit.hardware.threads import usable_processors
from lorakit.progress import Progress
from lorakit.recipe.schema import Source

_WORTHWHILE = 1 << 20  # bytes of rows below which starting more processes takes longer than they save


def run_pipeline(
    sources: Sequence[Source], template: ChatTemplate, rules: Rules, path: Path, progress: Progress
) -> UsableRows:
    """Read, render and encode every row of `sources`; the examples go into the Arrow file `path`."""
    opened = [open_source(source) for source in sources]
    takes = [_Take(one.source.take) for one in opened]
    size = sum(one.size for one in opened)
    worker = Worker(opened, template, rules)
    parts, reports, sent, count = [], (Report(), Report()), deque[tuple[int, int, str]](), 0

    def pieces() -> Iterator[tuple[int, Block, int]]:
        for number, one in enumerate(opened):
            for block in one.blocks:
                sent.append((number, block.size, block.name))
                yield number, block, takes[number].ceiling

    for system in sorted({one.source.system for one in opened if one.source.system}):
        _check_system_prompt(system, template, rules, reports[0])
    label = f"reading {source_name(opened[0].source)}" + (f" and {len(opened) - 1} more" if len(opened) > 1 else "")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
        progress.bar(label, total=size, unit="bytes") as bar,
        closing(map_in_order(worker, pieces(), usable_processors() if size > _WORTHWHILE else 1)) as results,
    ):
        for result in results:
            number, done, name = sent.popleft()
            writer.write_batch(result.examples)
            takes[number].add(result.rows.digests)
            opened[number].count_block(name, result.read, result.columns, result.filled)
            parts.append(result.rows)
            count += result.read
            bar.advance(done, f"{count:,} rows")
    for one in opened:
        one.check_all_rows()
    for report in reports:
        report.sources = [
            SourceReport(source_name(one.source), one.format, one.why, one.source.task, one.source.weight)
            for one in opened
        ]
    return join_rows(parts, reports, path)


def _check_system_prompt(system: str, template: ChatTemplate, rules: Rules, report: Report) -> None:
    """What of the recipe's own system prompt the model would not read as text; a `UserError` where it ends a turn or
    begins a sequence, or spells a special token and the recipe says to stop."""
    for mark in sorted(template.marks):
        if mark in system:
            what = f"it contains the text {mark!r}, with which a turn of this model ends or a sequence begins"
            raise UserError(f"data.system: {what}. Take it out.")
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
