"""Scoring a run: its base model and its adapter on the same held-out rows, in one load."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.data.batches import collate, split_batch
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.generate import generate, until_stop
from lorakit.folders import write_whole
from lorakit.model.attach import load_adapter
from lorakit.model.base import Base
from lorakit.model.fused import fused_lora
from lorakit.model.load import load_model, pad_token_id
from lorakit.model.loss import supervised_loss
from lorakit.plan.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.kinds import trains_all
from lorakit.runs import Run, now, versions
from lorakit.tables import METRICS

_LOSS_ROWS = 8


@dataclass(frozen=True)
class Scored:
    """One model's scores by name, and its answers to the rows that ask for one."""

    name: str
    scores: dict[str, float]
    answers: list[str]


def evaluate(run: Run, prepared: Prepared, progress: Progress) -> tuple[list[Scored], Path]:
    """Loss, perplexity and the recipe's metrics for base and adapter; the scores and the file that holds them.

    Raises:
        UserError: the recipe names no held-out rows.
    """
    recipe = prepared.recipe
    if prepared.held_out is None:
        raise UserError("data.eval: the recipe names no held-out rows to score on. Write a file, or a fraction.")
    rows = prepared.held_out.rows
    if recipe.evaluate.rows != "all":
        rows = rows.select(range(min(int(recipe.evaluate.rows), len(rows))))
    models = _base_and_model(run, prepared) if trains_all(recipe.adapter) else _base_and_adapter(run, prepared)
    scored = [score(name, model, prepared, list(rows), progress) for name, model in models]
    return scored, _write(run, prepared, scored, list(rows))


def _base_and_adapter(run: Run, prepared: Prepared) -> Iterator[tuple[str, Any]]:
    """One model in memory, first without its adapter and then with it."""
    model = load_adapter(load_model(prepared.base, prepared.model, prepared.machine.device), run.adapter)
    with model.disable_adapter():
        yield "base", model
    yield "adapter", model


def _base_and_model(run: Run, prepared: Prepared) -> Iterator[tuple[str, Any]]:
    """After a full fine-tuning there are two models, one in memory at a time."""
    for name, base in (("base", prepared.base), ("model", Base(str(run.model), run.model, "trained"))):
        yield name, load_model(base, prepared.model, prepared.machine.device)


def score(name: str, model: Any, prepared: Prepared, rows: list[dict[str, Any]], progress: Progress) -> Scored:
    """One model's loss and perplexity on the rows, and the recipe's metrics on its answers to them."""
    settings, tokenizer, stops = prepared.recipe.evaluate, prepared.tokenizer, prepared.stop_ids
    with fused_lora(model):
        loss = held_out_loss(model, rows, pad_token_id(tokenizer), f"{name}: loss", progress)
    scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    asked = [row for row in rows if row["answer"] >= 0]
    if not settings.metrics or not asked:  # texts have no answer to generate
        return Scored(name, scores, [])
    answers = generate(
        model,
        tokenizer,
        [row["input_ids"][: row["answer"]] for row in asked],
        stops,
        settings.max_new_tokens,
        pad_token_id(tokenizer),
        f"{name}: answers",
        progress,
    )
    references = [reference_of(row, tokenizer, stops) for row in asked]
    return Scored(name, scores | metric_scores(settings.metrics, answers, references), answers)


def held_out_loss(model: Any, rows: list[dict[str, Any]], pad: int, label: str, progress: Progress) -> float:
    """The mean cross-entropy over all trained tokens of the rows, in nats."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    total, tokens = 0.0, 0
    with torch.inference_mode(), progress.bar(label, total=len(rows)) as bar:
        for batch in split_batch(order, _LOSS_ROWS):
            tensors = collate([rows[index] for index in batch], pad)
            summed, count = supervised_loss(model, **{key: value.to(model.device) for key, value in tensors.items()})
            total, tokens = total + float(summed), tokens + count
            bar.advance(len(batch))
    if not math.isfinite(total):
        raise LorakitError(
            f"{label} is {total}: this model gives no numbers on the held-out rows. Its weights are broken."
        )
    return total / tokens


def reference_of(row: dict[str, Any], tokenizer: Any, stop_ids: Sequence[int]) -> str:
    """The text of a row's last answer."""
    return str(tokenizer.decode(until_stop(row["input_ids"][row["answer"] :], stop_ids), skip_special_tokens=True))


def metric_scores(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of each metric over the rows that have an answer; a metric's parts are named `metric.part`."""
    scores: dict[str, float] = {}
    for name in names:
        parts: dict[str, list[float]] = {}
        for answer, reference in zip(answers, references, strict=True):
            for part, value in METRICS[name].function(answer, reference).items():
                parts.setdefault(f"{name}.{part}" if part else name, []).append(value)
        scores |= {part: sum(values) / len(values) for part, values in parts.items()}
    return scores


def _write(run: Run, prepared: Prepared, scored: list[Scored], rows: list[dict[str, Any]]) -> Path:
    """One JSON of the scores, and beside it one line a row with every answer."""
    taken = now()
    path = run.evaluations / f"{re.sub('[^0-9T]', '', taken.split('+')[0])}.json"
    facts = {
        "format": 1,
        "taken": taken,
        "versions": versions(),
        "rows": len(rows),
        "max_new_tokens": prepared.recipe.evaluate.max_new_tokens,
        "models": {model.name: model.scores for model in scored},
    }
    lines = []
    for index, row in enumerate(row for row in rows if row["answer"] >= 0):
        answers = {model.name: model.answers[index] for model in scored if model.answers}
        lines.append(
            {
                "where": row["where"],
                "prompt": prepared.tokenizer.decode(row["input_ids"][: row["answer"]]),
                "reference": reference_of(row, prepared.tokenizer, prepared.stop_ids),
                **answers,
            }
        )
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_whole(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return path
