"""Examples: the rows of a recipe's sources, rendered, encoded, held to `max_length`, counted, and cached by content."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np

from lorakit.data.cache import cached, key_of
from lorakit.data.cache import tokenizer_sha256 as tokenizer_sha256
from lorakit.data.encoding import IGNORED, Encoded, encode
from lorakit.data.files import Row
from lorakit.data.formats import Conversation, RowError
from lorakit.data.rendering import ChatTemplate, Rendered, render
from lorakit.data.report import Report
from lorakit.data.sources import content_of, is_file, open_source, shown, sources_of
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.problems import one_line
from lorakit.recipe.schema import Data, Source
from lorakit.tables import FORMATS

_BATCH = 1000


@dataclass(frozen=True)
class Examples:
    """`rows` has the columns input_ids, labels (-100 where not trained), answer (the token index at which the last
    answer begins) and where (file and line)."""

    rows: datasets.Dataset
    report: Report
    key: str

    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids in self.rows.with_format("numpy", columns=["input_ids"])["input_ids"]]


@dataclass(frozen=True)
class Share:
    """One side of a split by a stable hash of what rows say: adding rows never moves old ones across, and rows that
    say the same are never parted."""

    fraction: float
    held_out: bool

    def takes(self, conversation: Conversation) -> bool:
        text = json.dumps(conversation, sort_keys=True)
        point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return (point < self.fraction) == self.held_out


def prepare(
    sources: list[Source],
    settings: Data,
    template: ChatTemplate,
    progress: Progress,
    share: Share | None = None,
) -> Examples:
    """Examples of all rows of `sources`, from the cache when nothing that matters has changed.

    `share` keeps only the rows on one side of a split by content; rows that say nothing readable belong to the side
    that is trained.

    Raises:
        UserError: a source cannot be read, a row is broken or overlong and the recipe says to stop, or nothing is left.
        LorakitError: the cache cannot be written.
    """
    key = key_of(sources, settings, template, share)
    rows, report = cached(key, lambda: _build(sources, settings, template, progress, share), progress)
    return Examples(rows, report, key)


def training_examples(settings: Data, template: ChatTemplate, progress: Progress) -> Examples:
    """The examples that a recipe trains on."""
    share = Share(settings.eval, held_out=False) if isinstance(settings.eval, float) else None
    return prepare(sources_of(settings, settings.train), settings, template, progress, share)


def held_out_examples(settings: Data, template: ChatTemplate, progress: Progress) -> Examples | None:
    """The examples that a recipe never trains on; None when it names none."""
    if settings.eval is None:
        return None
    if isinstance(settings.eval, float):
        share = Share(settings.eval, held_out=True)
        return prepare(sources_of(settings, settings.train), settings, template, progress, share)
    return prepare(sources_of(settings, settings.eval), settings, template, progress)


def file_sha256s(settings: Data) -> dict[str, str]:
    """The sha256 of every data file that the recipe names, by path; a hub dataset's fingerprint by its id and split."""
    written = [settings.train]
    if settings.eval is not None and not isinstance(settings.eval, float):
        written.append(settings.eval)
    sources = [source for item in written for source in sources_of(settings, item)]
    return {source.path if is_file(source) else shown(source): content_of(source) for source in sources}


def _build(
    sources: list[Source], settings: Data, template: ChatTemplate, progress: Progress, share: Share | None
) -> tuple[datasets.Dataset, Report]:
    report = Report()
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "answer": [], "where": []}
    stops: Counter[str] = Counter()
    for source in sources:
        rendered = _rendered(source, settings, template, report, share)
        with progress.bar(f"reading {shown(source)}", total=0) as bar:
            for batch in _batches(rendered):
                encoded = encode([text for _, text in batch], template.tokenizer)
                for (where, text), example in zip(batch, encoded, strict=True):
                    fitted = _fit(example, settings, where, report)
                    if fitted is not None:
                        columns["input_ids"].append(np.asarray(fitted.input_ids, dtype=np.int32))
                        columns["labels"].append(np.asarray(fitted.labels, dtype=np.int32))
                        columns["answer"].append(fitted.turns[-1][0])
                        columns["where"].append(where)
                        stops.update(span.stop for span in text.spans[: len(fitted.turns)])
                bar.advance(len(batch))
    if not columns["where"]:
        raise UserError(_nothing_left(sources, report, share))
    report.kept = len(columns["where"])
    report.tokens = sum(map(len, columns["input_ids"]))
    report.trained_tokens = sum(int((labels != IGNORED).sum()) for labels in columns["labels"])
    report.longest = max(map(len, columns["input_ids"]))
    report.stop_tokens = [stop for stop, _ in stops.most_common()]
    features = datasets.Features(
        input_ids=datasets.List(datasets.Value("int32")),
        labels=datasets.List(datasets.Value("int32")),
        answer=datasets.Value("int32"),
        where=datasets.Value("string"),
    )
    table = datasets.table.InMemoryTable.from_pydict(columns, schema=features.arrow_schema)
    return datasets.Dataset(table), report


def _batches(items: Iterable[tuple[str, Rendered]]) -> Iterator[list[tuple[str, Rendered]]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _rendered(
    source: Source, settings: Data, template: ChatTemplate, report: Report, share: Share | None
) -> Iterator[tuple[str, Rendered]]:
    """The rendered conversations of one source; broken rows go to the report or stop the work."""
    format_name, why, rows = open_source(source)
    report.sources.append(f"{shown(source)}: {format_name or 'no format'} ({why})")
    row = None
    for row in rows:
        conversation = _conversation(row, format_name)
        if share and not _takes(share, conversation):
            continue
        report.read += 1
        try:
            if isinstance(conversation, RowError):
                raise conversation
            yield row.where, render(conversation, template)
        except RowError as error:
            _broken(error, row.where, settings, report)
    if row is None:
        raise UserError(f"{shown(source)}: no rows. A source needs at least one.")


def _conversation(row: Row, format_name: str | None) -> Conversation | RowError:
    if isinstance(row.record, RowError):
        return row.record
    try:
        return FORMATS[format_name or ""].function(row.record)
    except RowError as error:
        return error


def _takes(share: Share, conversation: Conversation | RowError) -> bool:
    return not share.held_out if isinstance(conversation, RowError) else share.takes(conversation)


def _broken(error: RowError, where: str, settings: Data, report: Report) -> None:
    if settings.broken == "error":
        raise UserError(
            f"{where}: {one_line(str(error), 600)}. Mend the row, or write data.broken: drop to leave such rows out "
            "and count them."
        )
    report.drop(error, where)


def _fit(encoded: Encoded | RowError, settings: Data, where: str, report: Report) -> Encoded | None:
    """The example within `max_length`, or None when it is dropped; both are counted."""
    if isinstance(encoded, RowError):
        _broken(encoded, where, settings, report)
        return None
    length, limit = len(encoded.input_ids), settings.max_length
    if length <= limit:
        return encoded
    if settings.overlong == "error":
        raise UserError(
            f"{where}: {length:,} tokens, data.max_length is {limit:,}. Raise it, or write data.overlong: drop or "
            "truncate."
        )
    if settings.overlong == "drop":
        report.drop(RowError(f"longer than {limit:,} tokens", f"{length:,} tokens"), where)
        return None
    kept = encoded.truncated(limit)
    if kept is None:
        report.drop(RowError(f"no answer fits whole into {limit:,} tokens", f"{length:,} tokens"), where)
    else:
        report.cut += 1
    return kept


def _nothing_left(sources: list[Source], report: Report, share: Share | None) -> str:
    names = ", ".join(map(shown, sources))
    if report.read:
        return f"{names}: none of {report.read:,} rows is left: {report.reasons()}."
    if share is None:
        return f"{names}: no rows."
    side = "is held out" if share.held_out else "is left to train on"
    return f"{names}: with data.eval: {share.fraction:g} no row {side}. Give more rows, or a file of held-out rows."
