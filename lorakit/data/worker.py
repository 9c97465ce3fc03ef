"""Work on one block of rows, in whichever process: rows -> conversations -> examples, as arrays."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.bounds import TooLong, bounded
from lorakit.data.chat_template import ChatTemplate, RenderedText, render
from lorakit.data.cleaning.clean import clean
from lorakit.data.cleaning.row_stats import RowStats, compute_row_stats
from lorakit.data.conversations import (
    IGNORED,
    Encoded,
    RowContent,
    Tokens,
    content_digest,
    split_point,
    up_to_last_answer,
)
from lorakit.data.formats import parse_record, refuse_rejected_answer
from lorakit.data.made import BlockExamples, TextLengths
from lorakit.data.report import Report
from lorakit.data.rows import Block, Row, RowError
from lorakit.data.sources import rename_columns
from lorakit.data.tokenize import Encoder
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

# What the rows of a block may take until they are rendered; most take milliseconds.
_SECONDS, _BYTES_A_SECOND, _MEMORY = 60, 500_000, 4 << 30


@dataclass(frozen=True)
class Task:
    """How the rows of one source become examples."""

    format: str | None
    settings: Any
    columns: Mapping[str, str]
    template: ChatTemplate
    flags: Mapping[str, bool] = field(default_factory=dict)
    """The columns that may say that an answer should not be given, and what they say then."""


@dataclass(frozen=True)
class Rules:
    """What holds for the rows of all sources.

    `share` is the held-out share where rows are split by what they say. `checks`: the row's own checks and what they
    do. `traits`, `near`, `style`: whether rows are compared with each other, by near likeness and by style too.
    """

    max_length: int
    overlong: str
    broken: str
    share: float | None = None
    checks: Mapping[str, str] = field(default_factory=dict)
    traits: bool = False
    near: bool = False
    style: bool = False
    apart: bool = False
    """Near-duplicates stay on one side of the split."""


@dataclass
class BlockResult:
    """What one block gave.

    Of each example: `owner` (which of the block's usable rows it is of), `lengths` and `trained`, in tokens. Of each
    usable row: `digests` (the sha256 of what it says, as four numbers), `cut` (it was truncated) and `traits`.
    `reports`: what became no example, on the trained and on the held-out side.
    """

    examples: pa.RecordBatch | None
    owner: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    digests: np.ndarray
    cut: np.ndarray
    shapes: TextLengths
    traits: RowStats | None
    reports: tuple[Report, Report]
    stops: Counter[str]
    columns: set[str]
    rows: int
    filled: set[str] = field(default_factory=set)
    """The columns that hold something in some row."""
    notes: dict[str, np.ndarray] = field(default_factory=dict)
    """What is to be said of how rows are trained, and which usable rows it holds for."""


@dataclass
class _Usable:
    """A row that says something, on its way."""

    where: str
    said: RowContent
    digest: bytes
    texts: list[RenderedText]


@dataclass
class Worker:
    """Works on blocks of the sources that `tasks` describe."""

    tasks: Sequence[Task]
    rules: Rules

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tasks[0].template.tokenizer)

    def get_ready(self) -> None:
        """Find out what is the same for all blocks, so that forked processes know it already."""
        _ = self._encoder, self.tasks[0].template.controls

    @cached_property
    def _ends(self) -> frozenset[int | None]:
        """The tokens that end an answer."""
        return frozenset(self._encoder.stop_id(word) for word in self.tasks[0].template.ends)

    def __call__(self, source: int, block: Block, ceiling: int) -> BlockResult:
        """The examples of a block of source number `source`. Rows whose number for `take` is above `ceiling` are
        passed over.

        Raises:
            UserError: a row is broken or overlong, and the recipe says to stop.
        """
        task, reports, columns = self.tasks[source], (Report(), Report()), set[str]()
        rows, usable, filled, where = 0, [], set[str](), block.name
        try:
            with bounded(_SECONDS + block.size / _BYTES_A_SECOND, _MEMORY):
                for row in block.rows():
                    rows, where = rows + 1, row.where
                    if isinstance(row.record, dict):
                        columns.update(row.record)
                        filled.update(name for name, value in row.record.items() if value is not None)
                    found = self._usable(row, task, reports, ceiling)
                    if found:
                        usable.append(found)
        except (TooLong, MemoryError) as error:
            more = f"{_MEMORY >> 30} GiB of memory" if isinstance(error, MemoryError) else "a minute of computing"
            raise UserError(
                f"{where}: preparing this row and those before it takes more than {more}. Its chat template may never "
                "end, or the row is far too long: shorten it or take it out."
            ) from error
        worked = self._encoded(source, usable, reports, columns, rows)
        worked.filled = filled
        return worked

    def _usable(self, row: Row, task: Task, reports: tuple[Report, Report], ceiling: int) -> _Usable | None:
        """The row rendered; None where it is dropped or not taken, which the reports then count."""
        report = reports[0]
        try:
            if isinstance(row.record, RowError):
                raise row.record
            record = rename_columns(row.record, task.columns)
            refuse_rejected_answer(record, task.flags)
            said = up_to_last_answer(parse_record(str(task.format), task.settings, record))
            digest = content_digest(said)
            if self.rules.checks:
                cleaned = self._cleaned(said, row.where, reports[self._own_side(digest)])
                if cleaned is None:
                    return None
                if cleaned is not said:
                    said, digest = cleaned, content_digest(cleaned)
            report = reports[self._own_side(digest)]
            if int.from_bytes(digest[8:16], "big") > ceiling:
                report.passed_over += 1
                return None
            return _Usable(row.where, said, digest, [] if isinstance(said, Tokens) else render(said, task.template))
        except RowError as error:
            self._broken(error, row.where, report)
            return None

    def _own_side(self, digest: bytes) -> bool:
        return self.rules.share is not None and split_point(digest) < self.rules.share

    def _cleaned(self, said: RowContent, where: str, report: Report) -> RowContent | None:
        cleaned, findings = clean(said, self.rules.checks, self.tasks[0].template.controls)
        for finding in findings:
            if self.rules.checks[finding.check] == "error":
                raise UserError(
                    f"{where}: {finding.field}: {finding.what}"
                    + (f": {one_line(finding.case, 200)}" if finding.case else "")
                    + f". Fix the row, or write data.clean.{finding.check}: fix."
                )
            left = "" if finding.fixed or self.rules.checks[finding.check] == "report" else " (left as it is)"
            case = f"{finding.field}: {finding.case}" if finding.case else finding.field
            report.findings.add(f"{finding.check}: {finding.what}{left}", where, case)
        if cleaned is None:
            found = next(finding for finding in findings if finding.fixed)
            report.drop(RowError(f"left out by data.clean.{found.check}", found.what), where)
        return cleaned

    def _broken(self, error: RowError, where: str, report: Report) -> None:
        if self.rules.broken == "error":
            raise UserError(
                f"{where}: {one_line(str(error), 600)}. Fix the row, or set data.broken: drop to leave such rows "
                "out and count them."
            )
        report.drop(error, where)

    def _encoded(
        self, source: int, usable: list[_Usable], reports: tuple[Report, Report], columns: set[str], rows: int
    ) -> BlockResult:
        texts = self._encoder.encode([text for row in usable for text in row.texts])
        encoded = iter(texts)
        made, kept, stops = BlockExamples(), list[_Usable](), Counter[str]()
        for row in usable:
            report = reports[self._own_side(row.digest)]
            examples = [next(encoded) for _ in row.texts] if row.texts else [self._from_tokens(row.said)]
            fitted = self._fitted(examples, row.where, report, made)
            if fitted is None:
                continue
            made.add(len(kept), fitted, row.where)
            kept.append(row)
            stops.update(span.stop for text in row.texts for span in text.spans)
        digests = np.frombuffer(b"".join(row.digest for row in kept), dtype=">u8").astype(np.uint64).reshape(-1, 4)
        wanted = self.rules.traits or self.rules.near
        return BlockResult(
            examples=made.batch(source),
            owner=np.array(made.owner, dtype=np.int64),
            lengths=np.diff(np.array(made.offsets, dtype=np.int64)),
            trained=np.array(made.trained, dtype=np.int64),
            digests=digests,
            cut=np.array(made.cut, dtype=bool),
            shapes=made.shapes(),
            traits=compute_row_stats([row.said for row in kept], self.rules.near, self.rules.style) if wanted else None,
            reports=reports,
            stops=stops,
            columns=columns,
            rows=rows,
            notes=_notes(kept),
        )

    def _from_tokens(self, said: RowContent) -> Encoded | RowError:
        assert isinstance(said, Tokens)
        if max(said.input_ids) >= self._encoder.vocabulary:
            return RowError(
                f"a token id is above the {self._encoder.vocabulary:,} of this model's tokenizer",
                f"it is {max(said.input_ids)}",
            )
        if self._encoder.bos is not None and said.input_ids[:2] == [self._encoder.bos] * 2:
            return RowError(f"the tokens begin with {self._encoder.tokenizer.bos_token!r} twice (leave one out)")
        turns = list(_trained_runs(said.labels))
        for _, end in turns:
            if end < len(said.input_ids) and said.input_ids[end] in self._ends:
                return RowError(
                    "the token that ends an answer is not trained, so the model would never learn to stop",
                    f"label {end + 1} is {IGNORED}, token {said.input_ids[end]}",
                )
        return Encoded(said.input_ids, said.labels, turns)

    def _fitted(
        self, examples: list[Encoded | RowError], where: str, report: Report, made: BlockExamples
    ) -> tuple[list[Encoded], bool] | None:
        """A row's examples within max_length and whether something was cut; None when the row is dropped."""
        whole = []
        for example in examples:
            if isinstance(example, RowError):
                self._broken(example, where, report)
                return None
            whole.append(example)
        for example in whole:
            made.shape(example)
        limit, longest = self.rules.max_length, max(len(example.input_ids) for example in whole)
        if longest <= limit:
            return whole, False
        if self.rules.overlong == "error":
            raise UserError(
                f"{where}: {longest:,} tokens, data.max_length is {limit:,}. Raise it, or write data.overlong: drop or "
                "truncate."
            )
        if self.rules.overlong == "truncate":
            short = [cut for example in whole if (cut := example.truncated(limit))]
            if short:
                return short, True
            report.drop(RowError(f"no answer fits whole into {limit:,} tokens", f"{longest:,} tokens"), where)
            return None
        if self.rules.overlong == "split" and not any(example.turns for example in whole):
            return [piece for example in whole for piece in example.pieces(limit)], False
        within = [example for example in whole if len(example.input_ids) <= limit]
        if within:  # one of several examples of a row whose template rewrites its history
            return within, True
        report.drop(RowError(f"longer than {limit:,} tokens", f"{longest:,} tokens"), where)
        return None


def _notes(rows: Sequence[_Usable]) -> dict[str, np.ndarray]:
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        for note in {text.note for text in row.texts if text.note}:
            found.setdefault(note, []).append(number)
    return {note: np.array(numbers, dtype=np.int64) for note, numbers in found.items()}


def _trained_runs(labels: list[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch of trained labels."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(labels) != IGNORED, [0]))))
    yield from map(tuple, edges.reshape(-1, 2).tolist())
