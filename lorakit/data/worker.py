"""Work on one block of rows, in whichever process: rows -> conversations -> examples, as arrays."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from lorakit.bounds import TooLong, bounded
from lorakit.data.chat_template import ChatTemplate, RenderedText, render
from lorakit.data.cleaning.clean import clean
from lorakit.data.cleaning.row_stats import compute_row_stats
from lorakit.data.example_arrays import UsableRows, count_trained, measure_texts, to_batch
from lorakit.data.report import Report
from lorakit.data.rows import IGNORED, Block, Encoded, Row, RowContent, RowError, Tokens, hash_row, up_to_last_answer
from lorakit.data.sources import OpenSource
from lorakit.data.tokenize import Encoder
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

EVERY_ROW = 2**64 - 1  # the number by content up to which rows are taken, where all are
_SECONDS, _BYTES_A_SECOND, _MEMORY = 60, 500_000, 4 << 30  # for the rows of a block; most take ms


@dataclass(frozen=True)
class Rules:
    """What holds for the rows of all sources."""

    max_length: int
    overlong: str
    broken: str
    share: float | int | None  # that is held out, or how many, where rows are split by what they say
    checks: Mapping[str, str]  # of a row alone, and what they do
    traits: bool  # whether rows are compared with each other; and by near likeness, and by style too
    near: bool
    style: bool
    apart: bool  # near-duplicates stay on one side of the split


@dataclass
class BlockResult:
    """What one block gave; of all rows read: their number, the columns that they have, and those `filled` in some."""

    rows: UsableRows
    examples: pa.RecordBatch
    read: int
    columns: set[str]
    filled: set[str]


@dataclass
class _RenderedRow:
    """A row on its way. `examples` are its texts as tokens, within max_length."""

    where: str
    task: str
    content: RowContent
    digest: bytes
    texts: list[RenderedText]
    examples: list[Encoded] = field(default_factory=list)
    cut: bool = False


class Worker:
    """Works on blocks of some open sources."""

    def __init__(self, opened: Sequence[OpenSource], template: ChatTemplate, rules: Rules) -> None:
        self.rules = rules
        self._sources = [one.without_blocks() for one in opened]
        self._templates = [replace(template, system=one.source.system) for one in opened]
        # What is the same for all blocks, so that forked processes know it already.
        self._encoder, self._controls = Encoder(template.tokenizer), self._templates[0].controls
        self._ends = {self._encoder.stop_id(word) for word in template.ends}  # the tokens that end an answer

    def __call__(self, source: int, block: Block, ceiling: int = EVERY_ROW) -> BlockResult:
        """The examples of a block of source number `source`. Rows whose number for `take` is above `ceiling` are passed
        over. A `UserError` where a row is broken or overlong, and the recipe says to stop."""
        reports, columns, filled = (Report(), Report()), set[str](), set[str]()
        read, rendered, where = 0, list[_RenderedRow](), block.name
        try:
            with bounded(_SECONDS + block.size / _BYTES_A_SECOND, _MEMORY):
                for row in block.rows():
                    read, where = read + 1, row.where
                    if isinstance(row.record, dict):
                        columns.update(row.record)
                        filled.update(name for name, value in row.record.items() if value is not None)
                    if one := self._rendered(row, source, reports, ceiling):
                        rendered.append(one)
        except (TooLong, MemoryError) as error:
            more = f"{_MEMORY >> 30} GiB of memory" if isinstance(error, MemoryError) else "a minute of computing"
            what = f"preparing this row and those before it takes more than {more}"
            remedy = "Its chat template may never end, or the row is far too long: shorten it or take it out."
            raise UserError(f"{where}: {what}. {remedy}") from error
        rows, texts = self._encode(rendered, reports)
        examples = [example for row in rows for example in row.examples]
        notes: dict[str, list[int]] = {}
        tasks: dict[str, list[int]] = {}
        for number, one in enumerate(rows):
            if one.task:
                tasks.setdefault(one.task, []).append(number)
            for note in {text.note for text in one.texts if text.note}:
                notes.setdefault(note, []).append(number)
        traits, near = self.rules.traits or self.rules.near, self.rules.near
        usable = UsableRows(
            source=np.full(len(rows), source, dtype=np.int16),
            digests=np.frombuffer(b"".join(one.digest for one in rows), ">u8").astype(np.uint64).reshape(-1, 4),
            cut=np.array([row.cut for row in rows], dtype=bool),
            traits=compute_row_stats([row.content for row in rows], near, self.rules.style) if traits else None,
            owner=np.repeat(np.arange(len(rows)), [len(row.examples) for row in rows]),
            length=np.array([len(example.input_ids) for example in examples], dtype=np.int64),
            trained=np.array([count_trained(example.labels) for example in examples], dtype=np.int64),
            text_lengths=measure_texts(texts),
            reports=reports,
            stops=Counter(span.stop for one in rows for text in one.texts for span in text.spans if span.trained),
            notes={note: np.array(numbers, dtype=np.int64) for note, numbers in notes.items()},
            tasks={task: np.array(numbers, dtype=np.int64) for task, numbers in tasks.items()},
        )
        owners = [row for row in rows for _ in row.examples]
        places, tags = [row.where for row in owners], [row.task for row in owners]
        return BlockResult(usable, to_batch(examples, places, tags, source), read, columns, filled)

    def _rendered(self, row: Row, source: int, reports: tuple[Report, Report], ceiling: int) -> _RenderedRow | None:
        """The row rendered; None where it is dropped or passed over, which the reports then count."""
        report = reports[0]
        try:
            if isinstance(row.record, RowError):
                raise row.record
            content = up_to_last_answer(self._sources[source].parse(row.record))
            digest = hash_row(content)
            if self.rules.checks:
                cleaned = self._cleaned(content, row.where, reports[self._side(digest)])
                if cleaned is None:
                    return None
                if cleaned is not content:
                    content, digest = cleaned, hash_row(cleaned)
            report = reports[self._side(digest)]
            if int.from_bytes(digest[8:16], "big") > ceiling:
                report.passed_over += 1
                return None
            texts = [] if isinstance(content, Tokens) else render(content, self._templates[source])
            return _RenderedRow(row.where, self._sources[source].tag(row.record), content, digest, texts)
        except RowError as error:
            self._drop(error, row.where, report)
            return None

    def _side(self, digest: bytes) -> bool:
        """Whether a row is held out by the split: a number between 0 and 1 made of its digest is below the share. A
        number of rows is known once all are, and until then none is."""
        return isinstance(self.rules.share, float) and int.from_bytes(digest[:8], "big") / 2**64 < self.rules.share

    def _cleaned(self, content: RowContent, where: str, report: Report) -> RowContent | None:
        cleaned, findings = clean(content, self.rules.checks, self._controls)
        for finding in findings:
            action = self.rules.checks[finding.check]
            if action == "error":
                what = finding.what + (f": {one_line(finding.case, 200)}" if finding.case else "")
                remedy = f"Fix the row, or write data.clean.{finding.check}: fix."
                raise UserError(f"{where}: {finding.field}: {what}. {remedy}")
            left = "" if finding.fixed or action == "report" else " (left as it is)"
            case = f"{finding.field}: {finding.case}" if finding.case else finding.field
            report.findings.add(f"{finding.check}: {finding.what}{left}", where, case)
        if cleaned is None:
            reason = next(finding for finding in findings if finding.fixed)
            report.drop(RowError(f"left out by data.clean.{reason.check}", reason.what), where)
        return cleaned

    def _drop(self, error: RowError, where: str, report: Report) -> None:
        if self.rules.broken == "error":
            remedy = "Fix the row, or set data.broken: drop to leave such rows out and count them."
            raise UserError(f"{where}: {one_line(str(error), 600)}. {remedy}")
        report.drop(error, where)

    def _encode(
        self, rows: list[_RenderedRow], reports: tuple[Report, Report]
    ) -> tuple[list[_RenderedRow], list[Encoded]]:
        """The rows that have examples, and the encoded texts of all rows, fitting or not."""
        encoded = iter(self._encoder.encode([text for row in rows for text in row.texts]))
        usable, everything = [], []
        for row in rows:
            report = reports[self._side(row.digest)]
            texts = [next(encoded) for _ in row.texts] if row.texts else [self._from_tokens(row.content)]
            if error := next((text for text in texts if isinstance(text, RowError)), None):
                self._drop(error, row.where, report)
                continue
            whole = [text for text in texts if isinstance(text, Encoded)]
            everything += whole
            try:
                row.examples, row.cut = self._fitted(whole, row.where)
                usable.append(row)
            except RowError as error:
                report.drop(error, row.where)
        return usable, everything

    def _from_tokens(self, content: RowContent) -> Encoded | RowError:
        assert isinstance(content, Tokens)
        ids, labels = content.input_ids, content.labels
        if max(ids) >= self._encoder.vocabulary:
            what = f"a token id is above the {self._encoder.vocabulary:,} of this model's tokenizer"
            return RowError(what, f"it is {max(ids)}")
        if self._encoder.bos is not None and ids[:2] == [self._encoder.bos] * 2:
            return RowError(f"the tokens begin with {self._encoder.tokenizer.bos_token!r} twice (leave one out)")
        edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(labels) != IGNORED, [0]))))
        turns = [(start, end) for start, end in edges.reshape(-1, 2).tolist()]
        for _, end in turns:
            if end < len(ids) and ids[end] in self._ends:
                what = "the token that ends an answer is not trained, so the model would never learn to stop"
                return RowError(what, f"label {end + 1} is {IGNORED}, token {ids[end]}")
        return Encoded(ids, labels, turns)

    def _fitted(self, texts: list[Encoded], where: str) -> tuple[list[Encoded], bool]:
        """A row's examples within max_length, and whether something was cut. A `RowError` where nothing fits, a
        `UserError` where the recipe says to stop."""
        limit, longest = self.rules.max_length, max(len(text.input_ids) for text in texts)
        if longest <= limit:
            return texts, False
        if self.rules.overlong == "error":
            what = f"{longest:,} tokens, data.max_length is {limit:,}"
            raise UserError(f"{where}: {what}. Raise it, or write data.overlong: drop or truncate.")
        if self.rules.overlong == "split" and not any(text.turns for text in texts):
            return [piece for text in texts for piece in text.pieces(limit)], False
        if self.rules.overlong == "truncate":
            short = [cut for text in texts if (cut := text.truncated(limit))]
            reason = f"no answer fits whole into {limit:,} tokens"
        else:  # one of several examples of a row whose template rewrites its history may fit
            short = [text for text in texts if len(text.input_ids) <= limit]
            reason = f"longer than {limit:,} tokens"
        if not short:
            raise RowError(reason, f"{longest:,} tokens")
        return short, True
