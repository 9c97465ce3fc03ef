"""The survey of a recipe's rows, for `lorakit data`: sizes, what the checks found, how long the rows are, and what
another `max_length`, batching or packing would make of them; and one row followed all the way."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.answers import pairs_of
from lorakit.data.batches import epoch_batches, first_fit_decreasing
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.example_arrays import TextLengths
from lorakit.data.examples import examples_of
from lorakit.data.figures import FigureSupport, measure_figures
from lorakit.data.mixture import rows_per_step
from lorakit.data.report import ReasonCounts, Report
from lorakit.data.rows import IGNORED, Row, block_of
from lorakit.data.sources import open_source
from lorakit.data.worker import Rules, Worker
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Data, Source, Train

_QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
_BARS = 12
_SAMPLED = 100_000  # rows looked at for padding: enough for two digits
_COMPARED = 5_000  # rows of each side whose figures are compared


@dataclass(frozen=True)
class Limit:
    """What one `max_length` would do. Shares are of all texts, or of all trained tokens; times relative to no limit."""

    max_length: int
    over: int
    trained_with_drop: float
    trained_with_truncate: float
    time_with_drop: float
    time_with_truncate: float


@dataclass(frozen=True)
class Padding:
    """Tokens that batches compute for each token of a row: in the order of the file, batched by length, packed."""

    in_file_order: float
    by_length: float
    packed: float


@dataclass(frozen=True)
class Survey:
    """The rows of a recipe. `lengths` (the tokens within which 5, 25, ... percent of the texts lie), `bins` and
    `limits` are of all texts. `actions` and `findings`: what each check of `data.clean` does, and found. `figures`:
    of held-out answers, None without any."""

    train: Examples
    held_out: Examples | None
    lengths: dict[str, int]
    bins: list[tuple[int, int, int]]
    limits: list[Limit]
    padding: Padding
    actions: dict[str, str]
    findings: dict[str, ReasonCounts]
    figures: FigureSupport | None = None

    @property
    def stopping(self) -> list[str]:
        """The checks that would stop a run at what they found."""
        return [check for check, action in self.actions.items() if action == "error" and self.findings[check].total]

    @property
    def reports(self) -> dict[str, Report]:
        sides = {"train": self.train, "held-out": self.held_out}
        return {name: examples.report for name, examples in sides.items() if examples}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            **{name.replace("-", "_"): report.to_dict() for name, report in self.reports.items()},
            "lengths": self.lengths,
            "histogram": [{"from": first, "to": last, "texts": count} for first, last, count in self.bins],
            "max_lengths": [asdict(limit) for limit in self.limits],
            "padding": asdict(self.padding),
            "figures": self.figures.to_dict() if self.figures else None,
            "checks": {
                check: {"name": check, "action": self.actions[check], "found": counts.counts}
                | {"first": counts.first, "rows": counts.total}
                for check, counts in self.findings.items()
            },
        }


def survey(settings: Data, template: ChatTemplate, training: Train, attention_at: float, progress: Progress) -> Survey:
    """Read, render and check every row that a recipe names; raises as `examples_of`. `attention_at`: the length in
    tokens at which the model's attention costs as much as its matrix products. A check whose action is `error` reports
    here (`stopping`)."""
    reporting = {check: "report" for check, action in settings.clean.model_dump().items() if action == "error"}
    looking = settings.model_copy(update={"clean": settings.clean.model_copy(update=reporting)})
    train, held_out = examples_of(looking, template, progress, survey=True)
    texts = train.text_lengths
    assert texts is not None
    findings = {check: ReasonCounts() for check in type(settings.clean).model_fields}
    for counts in (one.report.findings for one in (train, held_out) if one):
        for reason, count in counts.counts.items():
            check, _, what = reason.partition(": ")
            findings[check].merge(ReasonCounts({what: count}, {what: counts.first[reason]}))
    quantiles = np.quantile(texts.length, list(_QUANTILES.values()), method="inverted_cdf")
    return Survey(
        train=train,
        held_out=held_out,
        lengths=dict(zip(_QUANTILES, map(int, quantiles), strict=True)),
        bins=histogram(texts.length),
        limits=limits(texts, settings.max_length, attention_at),
        padding=padding(train.lengths(), rows_per_step(training, train.report.mean_length), training.seed),
        actions=settings.clean.model_dump(),
        findings=findings,
        figures=_compare_figures(train, held_out, template.tokenizer) if held_out else None,
    )


def _compare_figures(train: Examples, held_out: Examples, tokenizer: Any) -> FigureSupport | None:
    stops = tokenizer.convert_tokens_to_ids(train.report.stop_tokens)
    trained, apart = (pairs_of(sample(side, _COMPARED), tokenizer, stops) for side in (train, held_out))
    return measure_figures(apart, [answer for _, answer in trained])


def sample(examples: Examples, count: int) -> list[dict[str, Any]]:
    """Some rows from the whole length of the set, with their place, input_ids and labels."""
    numbers = np.unique(np.linspace(0, len(examples.rows) - 1, num=count, dtype=int))
    return [examples.rows[int(number)] for number in numbers]


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Bins of round widths: first and last token count, and how many texts lie within. Few long ones share the last."""
    top = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    least = max(1, -(-top // _BARS))
    unit = 10 ** (len(str(least)) - 1)
    width = next(step * unit for step in (1, 2, 5, 10) if step * unit >= least)
    edges = [*range((int(lengths.min()) - 1) // width * width, top + width, width)]
    counts, _ = np.histogram(lengths, bins=[edge + 0.5 for edge in edges])
    bins = [(start + 1, start + width, int(count)) for start, count in zip(edges[:-1], counts, strict=True)]
    beyond = int((lengths > edges[-1]).sum())
    return [*bins, (edges[-1] + 1, int(lengths.max()), beyond)] if beyond else bins


def limits(texts: TextLengths, current: int, attention_at: float) -> list[Limit]:
    """What each of several values of `max_length` would do to the texts, the current one among them."""
    longest = int(texts.length.max())
    powers = [1 << power for power in range(5, 21) if texts.length.min() < 1 << power < 2 * longest]
    owner = np.repeat(np.arange(len(texts.length)), texts.turns)
    without_turns = texts.turns == 0
    all_trained, all_time = max(int(texts.trained.sum()), 1), _time(texts.length, attention_at)
    limits = []
    for limit in sorted({*powers[-6:], current}):
        whole, within = texts.length <= limit, texts.ends <= limit
        length, trained = np.zeros_like(texts.length), np.zeros_like(texts.length)
        np.maximum.at(length, owner[within], texts.ends[within])
        np.maximum.at(trained, owner[within], texts.trained_by_end[within])
        length[without_turns], trained[without_turns] = limit, np.minimum(limit, texts.trained[without_turns])
        length, trained = np.where(whole, texts.length, length), np.where(whole, texts.trained, trained)
        shares = [float(rest.sum()) / all_trained for rest in (texts.trained[whole], trained)]  # dropped, or truncated
        times = [_time(rest, attention_at) / all_time for rest in (texts.length[whole], length)]
        limits.append(Limit(limit, int((~whole).sum()), *shares, *times))
    return limits


def _time(lengths: np.ndarray, attention_at: float) -> float:
    """The cost of texts in token units: attention grows with the length, the rest does not."""
    return float((lengths * (1 + lengths / attention_at)).sum())


def padding(lengths: np.ndarray, batch_size: int, seed: int) -> Padding:
    """What padding costs when whole steps are computed at once; of very many rows, of a random sample."""
    if len(lengths) > _SAMPLED:
        lengths = np.random.default_rng(seed).choice(lengths, _SAMPLED, replace=False)
    longest, total = int(lengths.max()), int(lengths.sum())
    arrival = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    batches = [lengths[rows] for rows in epoch_batches(lengths.tolist(), batch_size, seed, 0)]
    packed = 0
    for batch in batches:
        packs = first_fit_decreasing(batch.tolist(), longest)
        packed += len(packs) * max(int(batch[pack].sum()) for pack in packs)
    padded = [sum(int(batch.max()) * len(batch) for batch in some) for some in (arrival, batches)]
    return Padding(*(tokens / total for tokens in (*padded, packed)))


def explain_row(
    where: str, sources: Sequence[Source], template: ChatTemplate, rules: Rules
) -> tuple[str, list[dict[str, Any]], list[str]]:
    """The place of the row at `where` (`train.jsonl:12`, or `train.parquet row 7`), its examples, and why it has none
    or what was found in it. A `UserError` where there is no such row, or a source cannot be read."""
    place = re.fullmatch(r"(.+?)(:\d+| row \d+)", where)
    wanted = {where, show_path(Path(place[1]).absolute()) + place[2]} if place else {where}
    last = ""
    for opened in map(open_source, sources):
        for row in chain.from_iterable(block.rows() for block in opened.blocks):
            last = row.where
            if row.where in wanted or row.where.endswith(f"/{where}"):
                return _follow(row, Worker([opened], template, replace(rules, broken="drop", share=None)))
    raise UserError(f"--row: no source has a row {where}. Rows are named as in messages: the last one is {last}.")


def _follow(row: Row, worker: Worker) -> tuple[str, list[dict[str, Any]], list[str]]:
    result = worker(0, block_of([row]))
    report, reasons = result.rows.reports[0], []
    for reason, (place, *_) in report.dropped.first.items():
        case = place.removeprefix(row.where).lstrip(": ")
        reasons.append(f"{reason}: {case}" if case else reason)
    reasons += [f"found: {reason}" for reason in report.findings.counts]
    return row.where, result.examples.to_pylist(), reasons


def decode_by_trained(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """The text of a row in stretches that are trained, or not."""
    groups = groupby(zip(input_ids, labels, strict=True), lambda pair: pair[1] != IGNORED)
    return [(tokenizer.decode([token for token, _ in group]), trained) for trained, group in groups]
