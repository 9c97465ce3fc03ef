"""How many rows a recipe has and how long they are, for a plan: a small data set is prepared in whole, as the run
prepares it; of a larger one the run's worker prepares a sample."""

import heapq
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, fmean, pstdev
from typing import TYPE_CHECKING, Any

from lorakit.amounts import percent
from lorakit.data.mixture import Mixture
from lorakit.data.readers import json_rows
from lorakit.data.rows import Block, Row, block_of
from lorakit.data.sources import OpenSource, is_file, open_source, sources_of
from lorakit.errors import UserError
from lorakit.plan.estimate import RowEstimate, assume_rows
from lorakit.plan.row_texts import compare_figures, evenly, sample_texts
from lorakit.progress import Silent
from lorakit.recipe.data_files import COLUMN_SUFFIXES, COMPRESSIONS
from lorakit.recipe.fields import is_split
from lorakit.recipe.schema import Data, Recipe, Source

if TYPE_CHECKING:
    from lorakit.data.chat_template import ChatTemplate
    from lorakit.data.report import Report

# Bytes up to which a source is prepared in whole, and four times as many of all sources; of packed and columnar ones.
_WHOLE, _WHOLE_PACKED = 1 << 20, 1 << 18
# Of a larger source so many bytes are read, and so many blocks, or twice as many, parsed.
_READ, _READ_PACKED, _BLOCKS = 1 << 26, 1 << 24, 16
# Rows of a source that are tokenized, or fewer of so many characters, and the longest ones besides: about a second.
_ROWS, _CHARACTERS, _LONGEST = 1200, 500_000, 16
# Lengths that stand for all where there are several sources.
_LENGTHS = 2000
# The share of the rows whose figures are compared with those of the others, where the recipe holds out none.
_APART = 0.1
# How much longer than the longest tokenized row another may be.
_MARGIN = 1.03
# Rows that are dropped for these reasons could be read.
_READABLE = ("longer than", "no answer fits", "left out by", "nearly the same")


@dataclass(frozen=True)
class SourceSample:
    """Rows from the whole length of a source, how many it has, and the longest of those that were looked at. `whole`:
    all are to be prepared. `counted`: `total` is no estimate. `searched`: `longest` are the longest of all."""

    opened: OpenSource
    rows: list[Row]
    total: float
    longest: list[Row]
    whole: bool
    counted: bool
    searched: bool

    @property
    def readable(self) -> list[Row]:
        return [row for row in self.rows if isinstance(row.record, dict)]

    def expect(self, share: float = 1.0) -> float:
        """The rows that `take` leaves of a share of all."""
        take, rows = self.opened.source.take, self.total * share
        return rows if take is None else rows * take if isinstance(take, float) else min(rows, take)


@dataclass(frozen=True)
class _Lengths:
    """What the rows of a source become: so many examples, and the tokens and trained tokens of some of them."""

    weight: float
    examples: float
    tokens: list[int]
    trained: int


def estimate_rows(recipe: Recipe, find_template: "Callable[[], ChatTemplate | None]") -> RowEstimate:
    """What the rows of a recipe are like; a `UserError` where a source cannot be read, or no row is left. Called where
    there are rows, `find_template` gives the tokenizer with its chat template, None where it is not on this machine."""
    data, limit = recipe.data, recipe.data.max_length
    held_out_files = [] if data.eval is None or is_split(data.eval) else sources_of(data, data.eval)
    local = [[_on_this_machine(source) for source in side] for side in (sources_of(data, data.train), held_out_files)]
    if not all(map(all, local)):
        return assume_rows(limit, "the rows are not on this machine")
    train, held_out = ([sample_source(source) for source in side if source] for side in local)
    if not any(one.readable for one in train):
        read = sum(len(one.rows) for one in train)
        raise UserError(f"data.train: no rows left ({read:,} read, none readable). lorakit data RECIPE shows each.")
    template = find_template()
    if template is None:
        reason = f"no tokenizer of {recipe.model.base} is on this machine"
        return replace(assume_rows(limit, reason), **_count(train, held_out, data.eval))
    # What would stop the run is only counted.
    clean = {check: "report" for check, action in data.clean.model_dump().items() if action == "error"}
    lenient: dict[str, Any] = {"broken": "drop", "overlong": "drop" if data.overlong == "error" else data.overlong}
    lenient |= {"clean": data.clean.model_copy(update=clean), "train": local[0], "eval": local[1] or data.eval}
    settings, samples = data.model_copy(update=lenient), [*train, *held_out]
    if all(one.whole for one in samples) and sum(one.opened.size for one in samples) <= 4 * _WHOLE:
        rows = _prepare_whole(settings, template)
    else:
        rows = _prepare_sample(settings, template, train, held_out)
    if not rows.lengths:
        raise UserError(
            f"data.train: no rows left of those looked at: {rows.broken} cannot be read, {percent(rows.overlong)} are "
            f"longer than data.max_length, {limit}. lorakit data RECIPE shows each."
        )
    share = _share_of(data.eval, sum(one.expect() for one in train)) if data.eval is not None else _APART
    trained, apart = ([(one.opened, one.readable) for one in side] for side in (train, held_out))
    return replace(rows, sample=sample_texts(trained), figures=compare_figures(trained, apart, share))


def _share_of(split: Any, rows: float) -> float:
    """The share of the training rows that is held out of them."""
    if not is_split(split):
        return 0.0
    return float(split) if isinstance(split, float) else min(split / max(rows, 1), 0.99)


def _count(train: list[SourceSample], held_out: list[SourceSample], split: Any) -> dict[str, Any]:
    """How many rows are trained on and held out, by the records that can be read."""
    rows = [one.expect(len(one.readable) / max(len(one.rows), 1)) for one in train]
    share = _share_of(split, sum(rows))
    weights = tuple(one.opened.source.weight for one in train)
    mixture = Mixture(tuple(round(count * (1 - share)) for count in rows), weights)
    apart = share * sum(rows) + sum(one.expect() for one in held_out)
    return {"mixture": mixture, "count": round(mixture.per_epoch), "held_out": round(apart)}


def _prepare_whole(settings: Data, template: "ChatTemplate") -> RowEstimate:
    """The rows as the run has them."""
    from lorakit.data.examples import examples_of

    train, held_out = examples_of(settings, template, Silent(), stored=False)
    assert train.text_lengths is not None
    index, sources = train.index, []
    for number, source in enumerate(train.report.sources):
        own = index.source == number
        tokens, trained = index.length[own].tolist(), int(index.trained[own].sum())
        sources.append(_Lengths(source.weight, source.examples, tokens, trained))
    reports = [train.report] + ([held_out.report] if held_out and is_split(settings.eval) else [])
    broken = sum(map(_count_broken, reports))
    return _combine(
        sources,
        held_out=held_out.report.examples if held_out else 0,
        longest=train.report.longest,
        overlong=float((train.text_lengths.length > settings.max_length).mean()),
        broken=broken,
        counted=f"the model's own tokenizer on all {sum(report.read for report in reports) - broken:,} rows",
        exact=True,
    )


def _prepare_sample(
    settings: Data, template: "ChatTemplate", train: list[SourceSample], held_out: list[SourceSample]
) -> RowEstimate:
    """The rows as the run's worker prepares some of them; what compares rows is left out."""
    import numpy as np

    from lorakit.data.examples import rules_of
    from lorakit.data.worker import Worker

    share = _share_of(settings.eval, sum(one.expect() for one in train))
    worker = Worker([one.opened for one in train], template, rules_of(settings, None, False))
    sources, texts, longest, tokenized, broken = [], [], 0, 0, 0
    for number, one in enumerate(train):
        most = max(50, int(_CHARACTERS / max(fmean(map(_characters, one.rows)), 1)))
        rows = evenly(sorted(one.rows, key=_characters), min(_ROWS, most))  # short and long ones in their proportion
        some, long = (worker(number, block_of(chosen)).rows for chosen in (rows, one.longest))
        examples = one.expect(len(some.cut) / max(len(rows), 1)) * len(some.length) / max(len(some.cut), 1)
        weight, tokens, trained = one.opened.source.weight, some.length.tolist(), int(some.trained.sum())
        sources.append(_Lengths(weight, examples * (1 - share), tokens, trained))
        texts.append(some.text_lengths.length)
        tallest = [*texts[-1].tolist(), *long.text_lengths.length.tolist()]
        longest = max(longest, _longest_of_all(texts[-1].tolist(), tallest, one))
        tokenized, broken = tokenized + len(texts[-1]), broken + _count_broken(some.reports[0])
    about = "" if all(one.counted for one in train) else "about "
    total = sum(one.total for one in train)
    apart = share / (1 - share) * sum(one.examples for one in sources) + sum(one.expect() for one in held_out)
    return _combine(
        sources,
        held_out=round(apart),
        longest=max([min(longest, settings.max_length), *(length for one in sources for length in one.tokens)]),
        overlong=float((np.concatenate(texts) > settings.max_length).mean()) if tokenized else 0.0,
        broken=broken,
        counted=f"the model's own tokenizer on {tokenized:,} of {about}{total:,.0f} rows",
    )


def _combine(sources: list[_Lengths], **known: Any) -> RowEstimate:
    """The sources as one, each with the weight of its rows, and what else is known."""
    mixture = Mixture(tuple(round(one.examples) for one in sources), tuple(one.weight for one in sources))
    expected = [one.weight * one.examples for one in sources]
    lengths: list[int] = []
    tokens = trained = 0.0
    for one, rows in zip(sources, expected, strict=True):
        own = sorted(one.tokens)
        lengths += own if len(sources) == 1 else evenly(own, round(_LENGTHS * rows / max(sum(expected), 1)))
        tokens += rows * sum(own) / max(len(own), 1)
        trained += rows * one.trained / max(len(own), 1)
    if lengths:
        mixture.refuse_extremes()
    return RowEstimate(
        count=round(mixture.per_epoch),
        mean=fmean(lengths) if lengths else 0.0,
        trained=trained / tokens if tokens else 0.0,
        mixture=mixture,
        lengths=tuple(sorted(lengths)),
        **known,
    )


def _longest_of_all(sampled: list[int], known: list[int], source: SourceSample) -> int:
    """The longest row of a source. Where not all were looked at, the logarithms of lengths are taken to be normal, and
    the longest of so many rows to lie where one set in ten goes beyond."""
    longest = max(known, default=0)
    if len(sampled) >= source.total or not sampled:
        return longest
    estimate = _MARGIN * longest
    if not source.searched:
        logs = [math.log(max(length, 1)) for length in sampled]
        beyond = NormalDist().inv_cdf(1 - 0.1 / max(source.total, 1))
        estimate = max(estimate, math.exp(fmean(logs) + pstdev(logs) * beyond))
    return math.ceil(estimate)


def _count_broken(report: "Report") -> int:
    return sum(count for reason, count in report.dropped.counts.items() if not reason.startswith(_READABLE))


def sample_source(source: Source) -> SourceSample:
    """Rows of a source on this machine: all of a small one."""
    opened = open_source(source)
    packed = any(name.endswith((*COMPRESSIONS, *COLUMN_SUFFIXES)) for name in opened.files)
    whole, most = (_WHOLE_PACKED, _READ_PACKED) if packed else (_WHOLE, _READ)
    blocks, lines, stride, position, ended = list[Block](), list[Row](), 1, 0, True
    for number, block in enumerate(opened.blocks):
        if position >= most:
            ended = False
            break
        position += block.size
        if number % stride == 0:
            blocks.append(block)
        if len(blocks) > 2 * _BLOCKS:  # evenly spaced, however many there are
            blocks, stride = blocks[::2], 2 * stride
        if block.parse is json_rows.parse_lines:
            line = max(block.payload.split(b"\n"), key=len)
            lines = heapq.nlargest(_LONGEST, [*lines, *block.parse(block.name, block.first, line)], key=_characters)
    rows = [row for block in blocks for row in block.rows()]
    counted = ended and stride == 1
    total = len(rows) if counted else len(rows) * opened.size / max(sum(block.size for block in blocks), 1)
    longest, searched = heapq.nlargest(_LONGEST, [*lines, *rows], key=_characters), counted or (ended and bool(lines))
    return SourceSample(opened, rows, total, longest, opened.size <= whole, counted, searched)


def _characters(row: Row) -> int:
    return len(str(row.record))


def _on_this_machine(source: Source) -> Source | None:
    """The source, where it is a hub dataset the Arrow files of its split in the cache of `datasets`; None where they
    are not there. They are found without that library, which takes a second to load."""
    if is_file(source):
        return source

    def letters(name: str) -> str:  # a folder's name is written in small letters
        return re.sub(r"[^a-z0-9.]", "", name.lower())

    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    if source.data_files is not None:
        return None
    wanted = re.compile(rf"-{re.escape(source.split)}(-\d+-of-\d+)?\.arrow$")
    shards = [
        path
        for folder in (cache.iterdir() if cache.is_dir() else ())
        if folder.is_dir() and letters(folder.name) == letters(source.path)
        for path in folder.rglob("*.arrow")
        if wanted.search(path.name) and source.subset in (None, path.relative_to(folder).parts[0])
    ]
    if not shards:
        return None
    newest = max(shards, key=lambda path: path.stat().st_mtime)
    return source.model_copy(update={"path": re.sub(r"-\d+-of-\d+\.arrow$", "-*-of-*.arrow", str(newest))})
