"""The files of an evaluation: the scores as one JSON document, and beside it a line for each row with every answer."""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lorakit.atomic_io import claim_name, write_atomic
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.comparison import comparison_to_dict, score_to_dict
from lorakit.evaluate.evaluation import Evaluation
from lorakit.evaluate.models import EvalModelSpec
from lorakit.evaluate.results import ModelResult
from lorakit.recipe.choice import entry_name, entry_settings
from lorakit.registry import METRICS
from lorakit.run_dir import now, versions

FORMAT = 2
"""The version of the document. It grows when a field changes its meaning or goes."""


def write_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Write `NAME.json` and `NAME.jsonl`, named by the time, into a folder; the path of the first.

    Raises:
        LorakitError: they cannot be written.
    """
    facts = evaluation_document(evaluation)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answer_lines(evaluation))
    return write_document(facts, folder, lines=lines)


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written into, before hours of work.

    Raises:
        UserError: it cannot be, or made.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written. Give --output DIR, a folder for scores and answers.")


def write_document(facts: dict[str, Any], folder: Path, prefix: str = "", lines: str | None = None) -> Path:
    """Write a document into a folder, named by its time; its path. `lines` go beside it, and it names their file.

    Raises:
        LorakitError: they cannot be written.
    """
    try:
        with _free(folder, prefix + re.sub("[^0-9T]", "", facts["taken"].split("+")[0])) as path:
            if lines is not None:
                facts["answers"] = path.with_suffix(".jsonl").name
                write_atomic(path.with_suffix(".jsonl"), lines)
            write_atomic(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise LorakitError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return path


def evaluation_document(evaluation: Evaluation) -> dict[str, Any]:
    """All scores and comparisons; figures that are no numbers are null."""
    settings, rows, machine = evaluation.settings, evaluation.rows, evaluation.model_set.machine
    baseline = evaluation.baseline.name
    facts = {
        "format": FORMAT,
        "taken": now(),
        "versions": versions(),
        "machine": {"device": machine.device, "name": machine.name},
        "rows": {
            "source": rows.source,
            "count": rows.count,
            "available": rows.available,
            "with_answer": rows.answers,
        },
        "settings": {
            "metrics": [_metric(metric) for metric in settings.metrics],
            "decoding": "greedy",
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
        },
        "notes": evaluation.notes,
        "baseline": baseline,
        "models": {model.name: _model(model, evaluation) for model in evaluation.models},
        "comparisons": [
            {
                "model": model.name,
                "against": baseline,
                "scores": {n: comparison_to_dict(one) for n, one in evaluation.comparisons[model.name].items()},
                "parts": {
                    part: {n: comparison_to_dict(one) for n, one in by_model[model.name].items()}
                    for part, by_model in evaluation.part_comparisons.items()
                },
            }
            for model in evaluation.others
        ],
    }
    facts["findings"] = {name: [one.to_dict() for one in those] for name, those in evaluation.findings.items()}
    found: dict[str, Any] = without_nan(facts)
    return found


def answer_lines(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Of each row that has an answer: where it stands, its prompt and reference, and what each model said to it."""
    rendered = evaluation.baseline.rendered
    lines = []
    for at, number in enumerate(rendered.with_answer):
        row, prompt = rendered.rows[number], rendered.prompts[at]
        source, generated = rendered.sources[row["source"]], [one for one in evaluation.models if one.answers]
        lines.append(
            {
                "where": row["where"],
                "source": source.path,
                "task": source.task,
                "prompt": rendered.tokenizer.decode(prompt),
                "reference": rendered.references[at],
                "answers": {model.name: model.answers[at] for model in generated},
                "cut": [model.name for model in generated if not model.outputs.answers[at].ended],
                "loss": {model.name: _row_loss(model, number) for model in evaluation.models},
            }
        )
    return lines


def _row_loss(model: ModelResult, row: int) -> float | None:
    """Nats a trained token."""
    return float(model.outputs.nats[row] / model.tokens[row]) if model.tokens[row] else None


def _model(model: ModelResult, evaluation: Evaluation) -> dict[str, Any]:
    return {
        **describe_model(model.spec, evaluation.model_set.machine.device),
        "scores": {name: score_to_dict(score) for name, score in evaluation.scores[model.name].items()},
        "parts": {
            part: {name: score_to_dict(score) for name, score in by_model[model.name].items()}
            for part, by_model in evaluation.parts.items()
        },
        "classification": {
            task: {
                "labels": list(one.labels),
                "confusion": one.confusion.tolist(),
                "auc": one.auc,
                "expected_calibration_error": one.ece,
            }
            for task, one in model.classifications.items()
        },
    }


def describe_model(spec: EvalModelSpec, device: str) -> dict[str, Any]:
    """What a subject is, and the sha256 of all that decides what it computes."""
    return {
        "given": spec.given,
        "kind": spec.kind,
        "base": spec.base.name,
        "base_origin": spec.base.origin,
        "adapter": str(spec.adapter) if spec.adapter else None,
        "dtype": spec.settings.dtype,
        "quantization": spec.settings.quantization,
        "identity": spec.identity(device),
    }


def _metric(metric: Any) -> Any:
    """A metric as a recipe writes it."""
    settings = entry_settings(METRICS, metric)
    return {entry_name(metric): settings.model_dump()} if settings else entry_name(metric)


@contextmanager
def _free(folder: Path, stem: str) -> Iterator[Path]:
    """A name that no other evaluation has or takes meanwhile, were it of the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
        with ExitStack() as held:
            try:
                held.enter_context(claim_name(path))
            except FileExistsError:
                continue
            if not (path.exists() or path.with_suffix(".jsonl").exists()):
                yield path
                return


def without_nan(facts: Any) -> Any:
    """JSON has no NaN: a figure that is no number is null."""
    if isinstance(facts, dict):
        return {key: without_nan(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [without_nan(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
