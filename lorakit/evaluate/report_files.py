"""The files of an evaluation: the scores as a JSON document, and beside it a line for each row with every answer."""

import json
import math
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.atomic_io import claim_name, write_atomic
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.models import EvalModelSpec
from lorakit.evaluate.results import Evaluation, ModelResult
from lorakit.recipe.fields import entry_name, entry_settings
from lorakit.registry import METRICS
from lorakit.run_dir import now, versions

FORMAT = 2
"""The version of the document. It grows when a field is removed or changes its meaning."""


def write_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Write `NAME.json` and `NAME.jsonl`, named by the time, into a folder; the path of the first."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _answer_lines(evaluation))
    return write_document(evaluation_document(evaluation), folder, lines=lines)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written or created, before hours of work."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written. Give --output DIR, a folder for scores and answers.")


def write_document(facts: dict[str, Any], folder: Path, prefix: str = "", lines: str | None = None) -> Path:
    """Write a document into a folder under a new name made of its time; its path. `lines` go into a file beside it,
    which it names."""
    stem = prefix + re.sub("[^0-9T]", "", facts["taken"].split("+")[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
            beside = path.with_suffix(".jsonl")
            try:
                with claim_name(path):  # no other process writes an evaluation of the same second under this name
                    if path.exists() or beside.exists():
                        continue
                    if lines is not None:
                        facts["answers"] = beside.name
                        write_atomic(beside, lines)
                    write_atomic(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
                    break
            except FileExistsError:
                continue
    except OSError as error:
        raise LorakitError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return path


def evaluation_document(evaluation: Evaluation) -> dict[str, Any]:
    """All scores and comparisons; NaN is null."""
    settings, rows, machine = evaluation.settings, evaluation.baseline.rendered, evaluation.model_set.machine
    metrics: list[Any] = []
    for metric in settings.metrics:
        own = entry_settings(METRICS, metric)
        metrics.append({entry_name(metric): own.model_dump()} if own else entry_name(metric))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "taken": now(),
        "versions": versions(),
        "machine": {"device": machine.device, "name": machine.name},
        "rows": {
            "source": evaluation.source,
            "count": len(rows.rows),
            "available": evaluation.available,
            "with_answer": len(rows.with_answer),
        },
        "settings": {
            "metrics": metrics,
            "decoding": "greedy",
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
        },
        "notes": evaluation.notes,
        "baseline": evaluation.baseline.name,
        "models": {model.name: _model(model, evaluation) for model in evaluation.models},
        "comparisons": [
            {
                "model": model.name,
                "against": evaluation.baseline.name,
                "scores": {n: one.to_dict() for n, one in evaluation.comparisons[model.name].items()},
                "parts": {
                    part: {n: one.to_dict() for n, one in by_model[model.name].items()}
                    for part, by_model in evaluation.part_comparisons.items()
                },
            }
            for model in evaluation.others
        ],
        "findings": {name: [one.to_dict() for one in findings] for name, findings in evaluation.findings.items()},
    }
    document: dict[str, Any] = without_nan(facts)
    return document


def _model(model: ModelResult, evaluation: Evaluation) -> dict[str, Any]:
    return {
        **describe_model(model.spec, evaluation.model_set.machine.device),
        "scores": {name: score.to_dict() for name, score in evaluation.scores[model.name].items()},
        "parts": {
            part: {name: score.to_dict() for name, score in by_model[model.name].items()}
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
    """What a model is, and the sha256 of all that decides what it computes."""
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


def _answer_lines(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Of each row with an answer: its place, prompt and reference, and every model's answer and loss per token."""
    rendered, models = evaluation.baseline.rendered, evaluation.models
    generated = [model for model in models if model.answers]
    lines = []
    for at, number in enumerate(rendered.with_answer):
        row = rendered.rows[number]
        source = rendered.sources[row["source"]]
        lines.append(
            {
                "where": row["where"],
                "source": source.path,
                "task": source.task,
                "prompt": rendered.tokenizer.decode(rendered.prompts[at]),
                "reference": rendered.references[at],
                "answers": {model.name: model.answers[at] for model in generated},
                "cut": [model.name for model in generated if not model.outputs.answers[at].ended],
                "loss": {
                    model.name: float(model.outputs.nats[number] / model.tokens[number])
                    if model.tokens[number]
                    else None
                    for model in models
                },
            }
        )
    return lines


def without_nan(facts: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(facts, dict):
        return {key: without_nan(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [without_nan(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
