"""An evaluation as tables, as a JSON document, and as lines with every answer."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.amounts import counted, format_difference, percent, without_nan
from lorakit.atomic_io import claim_name, write_atomic
from lorakit.errors import LorakitError
from lorakit.evaluate.classification import LabelScores
from lorakit.evaluate.diagnosis.finding import format_number
from lorakit.evaluate.gate import Gate
from lorakit.evaluate.metric import Comparison, Measure, Score, loss
from lorakit.evaluate.models import EvalModelSpec
from lorakit.evaluate.prompting import AnswerCosts
from lorakit.evaluate.run import Evaluation
from lorakit.evaluate.served_answers import ServedAnswers
from lorakit.hardware.machine import Machine
from lorakit.recipe.fields import entry_name, entry_settings
from lorakit.registry import METRICS
from lorakit.run_dir import now, versions

_MOST_LABELS = 10  # whose confusion matrix a terminal has room for
FORMAT = 2
"""The version of the document. It grows when a field is removed or changes its meaning."""
Table = tuple[str, list[str], list[list[str]]]
"""Title, columns and rows."""


def write_evaluation(evaluation: Evaluation, folder: Path, more: Mapping[str, Any] | None = None) -> Path:
    """Write `NAME.json` and `NAME.jsonl`, named by the time, into a folder; the path of the first. `more`: what else
    the document says."""
    lines = "".join(json.dumps(without_nan(line), ensure_ascii=False) + "\n" for line in _answer_lines(evaluation))
    return write_document({**evaluation_document(evaluation), **(more or {})}, folder, lines=lines)


def write_document(facts: dict[str, Any], folder: Path, prefix: str = "", lines: str | None = None) -> Path:
    """Write a document into a folder under a new name made of its time, NaN as null; its path. `lines` go into a file
    beside it, which it names."""
    stem = prefix + re.sub("[^0-9T]", "", facts["taken"].split("+")[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
            beside = path.with_suffix(".jsonl")
            # No other process writes an evaluation of the same second under this name.
            with suppress(FileExistsError), claim_name(path):
                if path.exists() or beside.exists():
                    continue
                if lines is not None:
                    facts["answers"] = beside.name
                    write_atomic(beside, lines)
                write_atomic(path, json.dumps(without_nan(facts), indent=2, ensure_ascii=False) + "\n")
                break
    except OSError as error:
        raise LorakitError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return path


def evaluation_document(evaluation: Evaluation) -> dict[str, Any]:
    settings, rendered, machine = evaluation.settings, evaluation.baseline.rendered, evaluation.model_set.machine
    own = {entry_name(metric): entry_settings(METRICS, metric) for metric in settings.metrics}
    metrics = [{name: of_metric.model_dump()} if of_metric else name for name, of_metric in own.items()]
    rows = {"source": evaluation.source, "count": len(rendered.rows), "available": evaluation.available}
    decoding = {"decoding": "greedy", "max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    return {
        **document_heading(FORMAT, machine),
        "rows": {**rows, "with_answer": len({*rendered.with_answer}), "answers": len(rendered.with_answer)},
        "settings": {"metrics": metrics, "turns": settings.turns, **decoding},
        "notes": [*evaluation.notes, *filter(None, [evaluation.missing_rival])],
        "baseline": evaluation.baseline.name,
        "models": {
            model.name: describe_model(model.spec, machine.device)
            | ({"identity": model.examined.identity()} if isinstance(model.examined, ServedAnswers) else {})
            | _of_parts({part: one.scores[model.name] for part, one in evaluation.parts.items()})
            | {"classification": {task: one.to_dict() for task, one in model.classifications.items()}}
            | {"costs": model.costs.to_dict() if model.costs else None}
            for model in evaluation.models
        },
        "comparisons": [
            {"model": model.name, "against": evaluation.baseline.name}
            | _of_parts({part: one.comparisons[model.name] for part, one in evaluation.parts.items()})
            for model in evaluation.others
        ],
        "prompting": [one.to_dict() for one in evaluation.prompting],
        "findings": {name: [asdict(one) for one in findings] for name, findings in evaluation.findings.items()},
    }


def document_heading(version: int, machine: Machine) -> dict[str, Any]:
    """What every document of scores begins with."""
    of_machine = {"device": machine.device, "name": machine.name}
    return {"format": version, "taken": now(), "versions": versions(), "machine": of_machine}


def _of_parts(parts: Mapping[str, Mapping[str, Score | Comparison]]) -> dict[str, Any]:
    plain = {part: {name: one.to_dict() for name, one in by_name.items()} for part, by_name in parts.items()}
    return {"scores": plain.pop(""), "parts": plain}


def describe_model(spec: EvalModelSpec, device: str) -> dict[str, Any]:
    """What a model is, and the sha256 of all that decides what it computes."""
    if spec.gguf:
        how = {"dtype": None, "quantization": spec.gguf.header.main_format, "file": spec.gguf.facts()}
        facts = {"given": spec.given, "kind": spec.kind, "base": None, "base_origin": "GGUF file", "adapter": None}
        return {**facts, **how, "identity": spec.identity(device)}
    if spec.endpoint:
        facts = {"given": spec.given, "kind": spec.kind, "base": None, "base_origin": "server", "adapter": None}
        return {**facts, "dtype": None, "quantization": None, "identity": spec.identity(device)}
    (base, settings), adapter = spec.loaded, str(spec.adapter) if spec.adapter else None
    prompting = {"prompting": asdict(spec.prompting)} if spec.prompting else {}
    facts = {"given": spec.given, "kind": spec.kind, "base": base.name, "base_origin": base.origin, "adapter": adapter}
    how = {"dtype": settings.dtype, "quantization": settings.quantization}
    return {**facts, **how, **prompting, "identity": spec.identity(device)}


def _answer_lines(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Of each answer: its row's place, its prompt and reference, every model's answer, the row's loss per token, and on
    the first line of each row what it adds to each measure (`Measure.rows`), from which another evaluation can be
    compared with this one."""
    rendered, models = evaluation.baseline.rendered, evaluation.models
    rows, before = sorted({*rendered.with_answer}), -1
    generated = [model for model in models if model.answers]
    losses = {model.name: loss(model.nats, model.tokens).by_row for model in models if len(model.nats)}
    for at, number in enumerate(rendered.with_answer):
        row = rendered.rows[number]
        source = rendered.sources[row["source"]]
        measured, before = None if number == before else rows.index(number), number
        yield {
            "where": row["where"],
            "source": source.path,
            "task": row["task"] or None,
            "prompt": rendered.tokenizer.decode(rendered.prompts[at]),
            "reference": rendered.references[at],
            "answers": {model.name: model.answers[at] for model in generated},
            "cut": [model.name for model in generated if not model.ended[at]],
            "loss": {name: float(of_rows[number]) for name, of_rows in losses.items()},
            "sums": {
                model.name: {
                    name: _sums(measure, None if measured is None else measured if group == "answers" else number)
                    for group in ("rows", "answers")
                    for name, measure in model.measures[""].get(group, {}).items()
                }
                for model in models
            },
        }


def _sums(measure: Measure, row: int | None) -> list[float]:
    """What a row adds; nothing on the further lines of a row."""
    return [0.0] * measure.rows.shape[1] if row is None else list(measure.rows[row].tolist())


def tables(evaluation: Evaluation, title: str) -> Iterator[Table]:
    """The scores, each other model's differences from the baseline, and the same of each task and source."""
    baseline = evaluation.baseline
    for part, one in evaluation.parts.items():
        yield score_table(part or f"{title}: {evaluation.rows_used}", one.scores)
        for name, compared in one.comparisons.items():
            rows = [(key, each, one.scores[name][key].measure) for key, each in compared.items()]
            yield comparison_table(f"{part}: {name} against {baseline.name}".removeprefix(": "), rows)
        if part:
            continue
        for task in dict.fromkeys(task for model in evaluation.models for task in model.classifications):
            of_task = {model.name: model.classifications.get(task) for model in evaluation.models}
            classified = {name: labels for name, labels in of_task.items() if labels}
            columns = {name: _classified(labels) for name, labels in classified.items()}
            yield score_table("likelihood of labels" + (f" of the task {task}" if task else ""), columns)
            for name, labels in classified.items():
                yield confusion_table(f"{task}: {name}" if task else name, labels)
        if any(model.spec.prompting for model in evaluation.models):
            costs = {model.name: _cost_cells(model.costs) for model in evaluation.models if model.costs}
            yield score_table("what an answer costs, on average", costs)
        cells = []
        for name, finding in ((name, finding) for name, of in evaluation.findings.items() for finding in of):
            verdict = "not measured" if finding.value is None else "LOOK" if finding.flagged else "fine"
            value = "-" if finding.value is None else format_number(finding.value)
            cells.append([name, finding.name, value, f"{finding.threshold:g}", verdict])
        if cells:
            yield "what may have gone wrong", ["", "", "found", "threshold", ""], cells


def score_table(title: str, by_model: Mapping[str, Mapping[str, object]]) -> Table:
    """Scores by model and name: models as columns and scores as rows."""
    names = list(dict.fromkeys(name for scores in by_model.values() for name in scores))
    cells = [[name, *(str(scores[name]) if name in scores else "-" for scores in by_model.values())] for name in names]
    return title, ["", *by_model], cells


def comparison_table(title: str, rows: Sequence[tuple[str, Comparison, Measure]]) -> Table:
    """Comparisons and the measures that they are of, by name: difference and interval with their signs, of shares in
    percentage points, and the verdict, or about how many rows would give one."""
    return title, ["", "difference", "95 % interval", "verdict"], [_comparison_row(*row) for row in rows]


def _comparison_row(name: str, one: Comparison, measure: Measure) -> list[str]:
    signed = partial(format_difference, unit=measure.unit)
    interval = f"{signed(one.interval.low)} to {signed(one.interval.high)}" if one.interval else "-"
    verdict: str = one.verdict
    if verdict == "cannot tell":
        verdict = "cannot tell at this size"
        if one.rows_needed is not None and one.rows_needed > one.rows:
            scale = 10 ** max(0, int(math.log10(one.rows_needed)) - 1)
            rounded = -(-one.rows_needed // scale) * scale  # to two figures: it is an estimate
            verdict += f", about {rounded:,} rows would be needed"
    return [name, signed(one.difference), interval, verdict]


def gate_table(gate: Gate) -> Table:
    """The differences from the reference, and of a gate on all rows which of them it lets pass."""
    rows, is_gate = [], not gate.part
    for one in gate.scores:
        cells = _comparison_row(one.name, one.comparison, one.measure)
        margin = format_difference(one.margin, one.measure.unit)[1:] if one.margin else "0"
        rows.append([*cells, *([margin, "FAILS" if one.fails else "passes"] if is_gate else [])])
    left_out = f", {gate.left_out:,} that were trained on left out" if gate.left_out else ""
    title = f"gate: {gate.model} not worse than" if is_gate else f"{gate.part}: {gate.model} against"
    columns = ["", "difference", "95 % interval", "verdict", *(["margin", ""] if is_gate else [])]
    return f"{title} {gate.against} ({counted(gate.rows, 'row')}{left_out})", columns, rows


def _cost_cells(costs: AnswerCosts) -> dict[str, str]:
    seconds = "-" if costs.seconds is None else f"{costs.seconds:.2f}"
    return {
        "prompt tokens": f"{costs.prompt_tokens:,.1f}",
        "answer tokens": f"{costs.answer_tokens:,.1f}",
        "seconds, in batches": seconds,
    }


def _classified(one: LabelScores) -> dict[str, str]:
    """What has no interval."""
    cells = {"labels": str(len(one.labels)), "auc": "-" if one.auc is None else f"{one.auc:.3f}"}
    cells["calibration error"] = f"{one.ece:.3f}"
    return cells


def confusion_table(title: str, one: LabelScores) -> Table:
    """What each true label (a row) was taken for (a column), its recall (of rows that have it) and its precision (of
    rows that were given it); where labels are many these and the most frequent mistake."""
    counts = one.confusion
    right, true, given = counts.diagonal(), counts.sum(1), counts.sum(0)
    shares = [[percent(hits / of) if of else "-" for hits, of in zip(right, ofs, strict=True)] for ofs in (true, given)]
    title = f"true labels down, predicted labels across: {title}"
    if len(one.labels) <= _MOST_LABELS:
        rows = [
            [label, *(f"{count:,}" for count in row), recall, precision]
            for label, row, recall, precision in zip(one.labels, counts, *shares, strict=True)
        ]
        return title, ["", *one.labels, "recall", "precision"], rows
    rows = []
    for number, label in enumerate(one.labels):
        others = [0 if other == number else int(count) for other, count in enumerate(counts[number])]
        most = max(range(len(others)), key=others.__getitem__)
        mistake = f"{one.labels[most]} ({others[most]:,})" if others[most] else "-"
        rows.append([label, f"{true[number]:,}", shares[0][number], shares[1][number], mistake])
    return f"labels: {title.rpartition(': ')[2]}", ["", "rows", "recall", "precision", "most often taken for"], rows
