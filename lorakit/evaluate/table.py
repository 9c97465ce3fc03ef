"""An evaluation as tables: models as columns and measures as rows, then each model against the baseline."""

import math
from collections.abc import Iterator, Mapping

from lorakit.evaluate.diagnosis.finding import Finding, format_number
from lorakit.evaluate.intervals import Comparison
from lorakit.evaluate.metric import Measure
from lorakit.evaluate.results import Evaluation, Score

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns and rows."""
COMPARISON_COLUMNS = ["", "difference", "95 % interval", "verdict"]


def tables(evaluation: Evaluation, title: str) -> Iterator[Table]:
    """The scores, each other model's differences from the baseline, and the same of each task and source."""
    baseline = evaluation.baseline.name
    yield _scores(f"{title}: {evaluation.rows_used}", evaluation.scores)
    for model in evaluation.others:
        compared = evaluation.comparisons[model.name]
        yield _differences(f"{model.name} against {baseline}", compared, evaluation.scores[model.name])
    for task, one in evaluation.baseline.classifications.items():
        name = f" of the task {task}" if task else ""
        yield f"likelihood of labels{name}", ["", *evaluation.scores], _classified(evaluation, task, one.labels)
    if evaluation.findings:
        cells = [_finding(name, one) for name, findings in evaluation.findings.items() for one in findings]
        yield "what may have gone wrong", ["", "", "found", "threshold", ""], cells
    for part, by_model in evaluation.parts.items():
        yield _scores(part, by_model)
        for model in evaluation.others:
            compared = evaluation.part_comparisons[part][model.name]
            yield _differences(f"{part}: {model.name} against {baseline}", compared, by_model[model.name])


def _scores(title: str, by_model: Mapping[str, Mapping[str, Score]]) -> Table:
    names = list(dict.fromkeys(name for scores in by_model.values() for name in scores))
    cells = [[name, *(str(scores[name]) if name in scores else "-" for scores in by_model.values())] for name in names]
    return title, ["", *by_model], cells


def _differences(title: str, compared: Mapping[str, Comparison], scores: Mapping[str, Score]) -> Table:
    rows = [comparison_row(name, one, scores[name].measure) for name, one in compared.items()]
    return title, COMPARISON_COLUMNS, rows


def comparison_row(name: str, one: Comparison, measure: Measure) -> list[str]:
    """A comparison as a table shows it: difference and interval with their signs, of shares in percentage points, and
    the verdict, or about how many rows would give one."""

    def signed(value: float) -> str:
        if math.isnan(value):
            return "-"
        if measure.unit == "share":
            return f"{100 * value:+.1f}"
        return ("+" if value >= 0 else "") + measure.write(value)

    interval = f"{signed(one.interval.low)} to {signed(one.interval.high)}" if one.interval else "-"
    verdict: str = one.verdict
    if verdict == "cannot tell":
        verdict = "cannot tell at this size"
        if one.rows_needed is not None and one.rows_needed > one.rows:
            scale = 10 ** max(0, int(math.log10(one.rows_needed)) - 1)
            rounded = -(-one.rows_needed // scale) * scale  # to two figures: it is an estimate
            verdict += f", about {rounded:,} rows would be needed"
    return [name, signed(one.difference), interval, verdict]


def _finding(model: str, one: Finding) -> list[str]:
    value, verdict = "-", "not measured"
    if one.value is not None:
        value, verdict = format_number(one.value), "LOOK" if one.flagged else "fine"
    return [model, one.name, value, f"{one.threshold:g}", verdict]


def _classified(evaluation: Evaluation, task: str, labels: tuple[str, ...]) -> list[list[str]]:
    """What has no interval, and how often each label is right."""
    every = [model.classifications.get(task) for model in evaluation.models]
    cells = [
        ["labels", *("-" if one is None else str(len(one.labels)) for one in every)],
        ["auc", *("-" if one is None or one.auc is None else f"{one.auc:.3f}" for one in every)],
        ["calibration error", *("-" if one is None else f"{one.ece:.3f}" for one in every)],
    ]
    for at, label in enumerate(labels):
        counts = [None if one is None else (one.confusion[at, at], one.confusion[at].sum()) for one in every]
        cells.append([f"right of {label}", *("-" if one is None else f"{one[0]:,} of {one[1]:,}" for one in counts)])
    return cells
