"""Examples: the rows of a recipe's sources, rendered, encoded, held to `max_length`, counted, and cached by content."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

import lorakit
from lorakit.data.encoding import IGNORED, Encoded, encode
from lorakit.data.formats import RowError, detect
from lorakit.data.rendering import ChatTemplate, Rendered, render
from lorakit.data.sources import Row, is_file, load_hub_dataset, read_rows, sources_of
from lorakit.errors import UserError
from lorakit.folders import cache_folder, sha256_of, whole_folder
from lorakit.progress import Progress
from lorakit.recipe.schema import Data, Source
from lorakit.tables import FORMATS

_BATCH = 1000
_NAMED = 5
_PARTS = ("formats.py", "sources.py", "rendering.py", "encoding.py", "examples.py")


@dataclass
class Report:
    """What became of the rows: counts, and the first cases of each reason with file and line."""

    sources: list[str] = field(default_factory=list)
    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    stop_tokens: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if len(self.first_dropped.setdefault(reason, [])) < _NAMED:
            self.first_dropped[reason].append(where)


@dataclass(frozen=True)
class Examples:
    """`rows` has the columns input_ids, labels (-100 where not trained), answer (the token index at which the last
    answer begins) and where (file and line)."""

    rows: datasets.Dataset
    report: Report
    key: str

    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids in self.rows["input_ids"]]


def prepare(
    sources: list[Source],
    settings: Data,
    template: ChatTemplate,
    progress: Progress,
    share: "Share | None" = None,
) -> Examples:
    """Examples of all rows of `sources`, from the cache when nothing that matters has changed.

    `share` keeps only the rows on one side of a split by content.

    Raises:
        UserError: a source cannot be read, a row is broken or overlong and the recipe says to stop, or nothing is left.
    """
    key = _key(sources, settings, template, share)
    folder = cache_folder() / "examples" / key
    if not (folder / "report.json").is_file():
        with whole_folder(folder) as draft:
            rows, report = _build(sources, settings, template, progress, share)
            rows.save_to_disk(draft / "rows")
            (draft / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
    report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    return Examples(datasets.load_from_disk(str(folder / "rows")), report, key)


@dataclass(frozen=True)
class Share:
    """One side of a split of rows by a stable hash of their content: adding rows never moves old ones across."""

    fraction: float
    held_out: bool

    def takes(self, record: dict[str, Any]) -> bool:
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
        point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return (point < self.fraction) == self.held_out


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
    """The sha256 of every data file that the recipe names, by path; a hub dataset's fingerprint by its id."""
    written = (
        [settings.train]
        if settings.eval is None or isinstance(settings.eval, float)
        else [settings.train, settings.eval]
    )
    sources = [source for item in written for source in sources_of(settings, item)]
    return {source.path: _content(source) for source in sources}


def _key(sources: list[Source], settings: Data, template: ChatTemplate, share: Share | None) -> str:
    """A name for the examples that changes with anything that could change them."""
    facts = {
        "lorakit": lorakit.__version__,
        "code": [sha256_of(Path(__file__).with_name(part)) for part in _PARTS],
        "sources": [[source.path, _content(source), source.format, source.columns] for source in sources],
        "settings": settings.model_dump(include={"train_on", "system", "max_length", "overlong", "broken"}),
        "tokenizer": tokenizer_sha256(template.tokenizer),
        "stop_words": template.stop_words,
        "share": asdict(share) if share else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _content(source: Source) -> str:
    if is_file(source):
        path = Path(source.path)
        if not path.is_file():
            raise UserError(f"{path}: there is no such file.")
        return sha256_of(path)
    return str(load_hub_dataset(source)._fingerprint)


def tokenizer_sha256(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer: its model, its special tokens and its chat template."""
    model = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    parts = [model, str(tokenizer.special_tokens_map), str(tokenizer.chat_template), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _build(
    sources: list[Source], settings: Data, template: ChatTemplate, progress: Progress, share: Share | None
) -> tuple[datasets.Dataset, Report]:
    report = Report()
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "answer": [], "where": []}
    stops: Counter[str] = Counter()
    for source in sources:
        rendered = _rendered(source, settings, template, report, share)
        with progress.bar(f"reading {Path(source.path).name}", total=0) as bar:
            for batch in _batches(rendered):
                for (where, text), encoded in zip(
                    batch, encode([text for _, text in batch], template.tokenizer), strict=True
                ):
                    fitted = _fit(encoded, settings, where, report)
                    if fitted is not None:
                        columns["input_ids"].append(np.asarray(fitted.input_ids, dtype=np.int32))
                        columns["labels"].append(np.asarray(fitted.labels, dtype=np.int32))
                        columns["answer"].append(fitted.turns[-1][0])
                        columns["where"].append(where)
                        stops.update(span.stop for span in text.spans)
                bar.advance(len(batch))
    if not columns["where"]:
        raise UserError(_nothing_left(sources, report))
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
    return datasets.Dataset.from_dict(columns, features=features), report


def _batches(items: Iterable[tuple[str, Rendered]]) -> Iterator[list[tuple[str, Rendered]]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _rendered(
    source: Source, settings: Data, template: ChatTemplate, report: Report, share: Share | None
) -> Iterator[tuple[str, Rendered]]:
    """The rendered conversations of one source; broken rows go to the report or stop the work."""
    format_name = None if source.format == "auto" else source.format
    for row in read_rows(source):
        if share and isinstance(row.record, dict) and not share.takes(row.record):
            continue
        report.read += 1
        if format_name is None and isinstance(row.record, dict):
            format_name, reason = detect({name for name, value in row.record.items() if value is not None}, row.where)
            report.sources.append(f"{source.path}: {format_name} ({reason})")
        try:
            yield row.where, _render_row(row, format_name, template)
        except RowError as error:
            _broken(error, row.where, settings, report)
    if source.format != "auto":
        report.sources.append(f"{source.path}: {format_name} (as the recipe says)")


def _render_row(row: Row, format_name: str | None, template: ChatTemplate) -> Rendered:
    if isinstance(row.record, RowError):
        raise row.record
    return render(FORMATS[format_name or ""].function(row.record), template)


def _broken(error: RowError, where: str, settings: Data, report: Report) -> None:
    if settings.broken == "error":
        raise UserError(
            f"{where}: {error}. Mend the row, or write data.broken: drop to leave such rows out and count them."
        )
    report.drop(str(error), where)


def _fit(encoded: Encoded | RowError, settings: Data, where: str, report: Report) -> Encoded | None:
    """The example within `max_length`, or None when it is dropped; both are counted."""
    if isinstance(encoded, RowError):
        _broken(encoded, where, settings, report)
        return None
    length = len(encoded.input_ids)
    if length <= settings.max_length:
        return encoded
    if settings.overlong == "error":
        raise UserError(
            f"{where}: {length} tokens, data.max_length is {settings.max_length}. Raise it, or write data.overlong: "
            "drop or truncate."
        )
    if settings.overlong == "truncate":
        kept = encoded.truncated(settings.max_length)
        if kept is not None:
            report.cut += 1
            return kept
        report.drop(f"no answer fits whole into {settings.max_length} tokens", where)
        return None
    report.drop(f"longer than {settings.max_length} tokens", where)
    return None


def _nothing_left(sources: list[Source], report: Report) -> str:
    names = ", ".join(source.path for source in sources)
    if not report.read:
        return f"{names}: no rows. A data file needs at least one."
    reasons = "; ".join(
        f"{count} {reason} (first: {report.first_dropped[reason][0]})" for reason, count in report.dropped.items()
    )
    return f"{names}: none of {report.read} rows is left: {reasons}."
