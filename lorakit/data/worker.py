"""Work on one block of rows, in whichever process: rows -> conversations -> examples, as arrays."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from lorakit.data.example_arrays import ExampleArrays, TextLengths, count_trained
from lorakit.data.formats import parse_record
from lorakit.data.formats.preference_data import refuse_rejected_answer
from lorakit.data.report import Report
from lorakit.data.rows import Block, Row, RowError
from lorakit.data.sources import OpenSource, rename_columns
from lorakit.data.tokenize import Encoder
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

# The number by content up to which rows are taken, where all are.
EVERY_ROW = 2**64 - 1
# What the rows of a block may take until they are rendered; most take milliseconds.
_SECONDS, _BYTES_A_SECOND, _MEMORY = 60, 500_000, 4 << 30


@dataclass(frozen=True)
class Task:
    """How the rows of one source become examples. `flags`: the columns that may say that an answer should not be given,
    and what they say then."""

    format: str | None
    settings: Any
    columns: Mapping[str, str]
    template: ChatTemplate
    flags: Mapping[str, bool]


def task_of(opened: OpenSource, template: ChatTemplate) -> Task:
    """The task of a source, with its own system prompt."""
    source = opened.source
    return Task(
        opened.format, opened.settings, source.columns or {}, replace(template, system=source.system), opened.flags
    )


@dataclass(frozen=True)
class Rules:
    """What holds for the rows of all sources.

    `share` is the held-out share where rows are split by what they say. `checks`: the row's own checks and what they
    do. `traits`, `near`, `style`: whether rows are compared with each other, by near likeness and by style too.
    `apart`: near-duplicates stay on one side of the split.
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


@dataclass
class BlockResult:
    """What one block gave.

    Of each example: `owner` (which of the block's usable rows it is of), `lengths` and `trained`, in tokens. Of each
    usable row: `digests` (the sha256 of what it says, as four numbers), `cut` (it was truncated) and `traits`.
    `reports`: what became no example, on the trained and on the held-out side. `columns` that the rows have, and those
    that are `filled` in some. `notes`: what is to be said of how rows are trained, and of which usable rows.
    """

    examples: pa.RecordBatch | None
    owner: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    digests: np.ndarray
    cut: np.ndarray
    text_lengths: TextLengths
    traits: RowStats | None
    reports: tuple[Report, Report]
    stops: Counter[str]
    columns: set[str]
    filled: set[str]
    rows: int
    notes: dict[str, np.ndarray]


@dataclass
class _Usable:
    """A row that says something, on its way."""

    where: str
    content: RowContent
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

    @cached_property
    def _ends(self) -> frozenset[int | None]:
        """The tokens that end an answer."""
        return frozenset(self._encoder.stop_id(word) for word in self.tasks[0].template.ends)

    def get_ready(self) -> None:
        """Find out what is the same for all blocks, so that forked processes know it already."""
        _ = self._encoder, self.tasks[0].template.controls

    def __call__(self, source: int, block: Block, ceiling: int = EVERY_ROW) -> BlockResult:
        """The examples of a block of source number `source`. Rows whose number for `take` is above `ceiling` are
        passed over.

        Raises:
            UserError: a row is broken or overlong, and the recipe says to stop.
        """
        reports, columns, filled = (Report(), Report()), set[str](), set[str]()
        rows, usable, where = 0, [], block.name
        try:
            with bounded(_SECONDS + block.size / _BYTES_A_SECOND, _MEMORY):
                for row in block.rows():
                    rows, where = rows + 1, row.where
                    if isinstance(row.record, dict):
                        columns.update(row.record)
                        filled.update(name for name, value in row.record.items() if value is not None)
                    rendered = self._rendered(row, self.tasks[source], reports, ceiling)
                    if rendered:
                        usable.append(rendered)
        except (TooLong, MemoryError) as error:
            more = f"{_MEMORY >> 30} GiB of memory" if isinstance(error, MemoryError) else "a minute of computing"
            raise UserError(
                f"{where}: preparing this row and those before it takes more than {more}. Its chat template may never "
                "end, or the row is far too long: shorten it or take it out."
            ) from error
        made = ExampleArrays()
        usable = self._encode(usable, reports, made)
        notes: dict[str, list[int]] = {}
        for number, one in enumerate(usable):
            for note in {text.note for text in one.texts if text.note}:
                notes.setdefault(note, []).append(number)
        return BlockResult(
            examples=made.to_batch(source),
            owner=np.array(made.owner, dtype=np.int64),
            lengths=np.array([len(example.input_ids) for example in made.examples], dtype=np.int64),
            trained=np.array([count_trained(example.labels) for example in made.examples], dtype=np.int64),
            digests=np.frombuffer(b"".join(one.digest for one in usable), ">u8").astype(np.uint64).reshape(-1, 4),
            cut=np.array(made.cut, dtype=bool),
            text_lengths=made.text_lengths(),
            traits=self._row_stats(usable),
            reports=reports,
            stops=Counter(span.stop for one in usable for text in one.texts for span in text.spans if span.trained),
            columns=columns,
            filled=filled,
            rows=rows,
            notes={note: np.array(numbers, dtype=np.int64) for note, numbers in notes.items()},
        )

    def _row_stats(self, rows: list[_Usable]) -> RowStats | None:
        if not (self.rules.traits or self.rules.near):
            return None
        return compute_row_stats([row.content for row in rows], self.rules.near, self.rules.style)

    def _rendered(self, row: Row, task: Task, reports: tuple[Report, Report], ceiling: int) -> _Usable | None:
        """The row rendered; None where it is dropped or passed over, which the reports then count."""
        report = reports[0]
        try:
            if isinstance(row.record, RowError):
                raise row.record
            record = rename_columns(row.record, task.columns)
            refuse_rejected_answer(record, task.flags)
            content = up_to_last_answer(parse_record(str(task.format), task.settings, record))
            digest = content_digest(content)
            if self.rules.checks:
                cleaned = self._cleaned(content, row.where, reports[self._side(digest)])
                if cleaned is None:
                    return None
                if cleaned is not content:
                    content, digest = cleaned, content_digest(cleaned)
            report = reports[self._side(digest)]
            if int.from_bytes(digest[8:16], "big") > ceiling:
                report.passed_over += 1
                return None
            texts = [] if isinstance(content, Tokens) else render(content, task.template)
            return _Usable(row.where, content, digest, texts)
        except RowError as error:
            self._drop(error, row.where, report)
            return None

    def _side(self, digest: bytes) -> bool:
        """Whether a row is held out by the split."""
        return self.rules.share is not None and split_point(digest) < self.rules.share

    def _cleaned(self, content: RowContent, where: str, report: Report) -> RowContent | None:
        cleaned, findings = clean(content, self.rules.checks, self.tasks[0].template.controls)
        for finding in findings:
            action = self.rules.checks[finding.check]
            if action == "error":
                raise UserError(
                    f"{where}: {finding.field}: {finding.what}"
                    + (f": {one_line(finding.case, 200)}" if finding.case else "")
                    + f". Fix the row, or write data.clean.{finding.check}: fix."
                )
            left = "" if finding.fixed or action == "report" else " (left as it is)"
            case = f"{finding.field}: {finding.case}" if finding.case else finding.field
            report.findings.add(f"{finding.check}: {finding.what}{left}", where, case)
        if cleaned is None:
            reason = next(finding for finding in findings if finding.fixed)
            report.drop(RowError(f"left out by data.clean.{reason.check}", reason.what), where)
        return cleaned

    def _drop(self, error: RowError, where: str, report: Report) -> None:
        if self.rules.broken == "error":
            raise UserError(
                f"{where}: {one_line(str(error), 600)}. Fix the row, or set data.broken: drop to leave such rows "
                "out and count them."
            )
        report.drop(error, where)

    def _encode(self, rows: list[_Usable], reports: tuple[Report, Report], made: ExampleArrays) -> list[_Usable]:
        """The rows that give examples, which go into `made`."""
        encoded = iter(self._encoder.encode([text for row in rows for text in row.texts]))
        usable = []
        for row in rows:
            report = reports[self._side(row.digest)]
            texts = [next(encoded) for _ in row.texts] if row.texts else [self._from_tokens(row.content)]
            error = next((text for text in texts if isinstance(text, RowError)), None)
            if error:
                self._drop(error, row.where, report)
                continue
            whole = [text for text in texts if isinstance(text, Encoded)]
            for text in whole:
                made.add_lengths(text)
            examples, cut = self._fitted(whole, row.where)
            if isinstance(examples, RowError):
                report.drop(examples, row.where)
            else:
                made.add_row(examples, cut, row.where)
                usable.append(row)
        return usable

    def _from_tokens(self, content: RowContent) -> Encoded | RowError:
        assert isinstance(content, Tokens)
        ids, labels = content.input_ids, content.labels
        if max(ids) >= self._encoder.vocabulary:
            return RowError(
                f"a token id is above the {self._encoder.vocabulary:,} of this model's tokenizer", f"it is {max(ids)}"
            )
        if self._encoder.bos is not None and ids[:2] == [self._encoder.bos] * 2:
            return RowError(f"the tokens begin with {self._encoder.tokenizer.bos_token!r} twice (leave one out)")
        edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(labels) != IGNORED, [0]))))
        turns = [(start, end) for start, end in edges.reshape(-1, 2).tolist()]
        for _, end in turns:
            if end < len(ids) and ids[end] in self._ends:
                return RowError(
                    "the token that ends an answer is not trained, so the model would never learn to stop",
                    f"label {end + 1} is {IGNORED}, token {ids[end]}",
                )
        return Encoded(ids, labels, turns)

    def _fitted(self, texts: list[Encoded], where: str) -> tuple[list[Encoded] | RowError, bool]:
        """A row's examples within max_length, or why it has none, and whether something was cut."""
        limit, longest = self.rules.max_length, max(len(text.input_ids) for text in texts)
        if longest <= limit:
            return texts, False
        if self.rules.overlong == "error":
            raise UserError(
                f"{where}: {longest:,} tokens, data.max_length is {limit:,}. Raise it, or write data.overlong: drop or "
                "truncate."
            )
        if self.rules.overlong == "truncate":
            short = [cut for text in texts if (cut := text.truncated(limit))]
            return short or RowError(f"no answer fits whole into {limit:,} tokens", f"{longest:,} tokens"), True
        if self.rules.overlong == "split" and not any(text.turns for text in texts):
            return [piece for text in texts for piece in text.pieces(limit)], False
        # One of several examples of a row whose template rewrites its history may fit.
        within = [text for text in texts if len(text.input_ids) <= limit]
        return within or RowError(f"longer than {limit:,} tokens", f"{longest:,} tokens"), True
