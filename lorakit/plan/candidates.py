"""What could be changed in a recipe to take less memory, or to use more: key by key, before anything is tried."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.amounts import percent
from lorakit.plan.estimate import Plan, RowEstimate
from lorakit.plan.model_info import ModelInfo
from lorakit.recipe.adapter_kind import initial_adapter, trains_all
from lorakit.recipe.schema import Recipe

# The share of rows that a lower limit of length may drop, or cut, to be named; and the lowest limit that is.
_MOST_LOST, _MOST_CUT, _SHORTEST = 0.05, 0.25, 64


@dataclass(frozen=True)
class Step:
    """One key set to another value, and what that costs besides memory."""

    key: str
    value: Any
    costs: str
    quality: int
    """How much it may cost in quality: 0 nothing, 1 hardly, 2 some, 3 rows are lost."""

    @property
    def option(self) -> str:
        """The `--set` argument that does it."""
        return f"{self.key}={_written(self.value)}"


def lessening(plan: Plan, facts: ModelInfo) -> Iterator[Step]:
    """What takes less memory."""
    recipe, asked = plan.recipe, plan.asked.train
    everything, on_gpu = trains_all(recipe.adapter), plan.place.machine.is_gpu
    if asked.micro_batch not in ("auto", 1):
        yield Step("train.micro_batch", "auto", "the same result, in smaller pieces", 0)
    if asked.gradient_checkpointing is False:
        yield Step("train.gradient_checkpointing", True, "the same result, blocks computed twice", 0)
    if recipe.model.attention == "eager" and "sdpa" in facts.attentions:
        yield Step("model.attention", "sdpa", "the same result within rounding", 0)
    if recipe.train.optimizer == "adamw":
        yield Step("train.optimizer", "adamw-8bit", "optimizer states in 8 bits", 1)
    if on_gpu and recipe.train.optimizer in ("adamw", "adamw-8bit"):
        yield Step("train.optimizer", "paged-adamw-8bit", "optimizer states in 8 bits, in main memory when full", 1)
    if recipe.model.dtype == "float32" and recipe.model.quantization == "none" and on_gpu:
        yield Step("model.dtype", "auto", "arithmetic in half precision", 1)
    if recipe.model.quantization == "none" and not (facts.stored and facts.stored.treatment == "kept"):
        yield Step("model.quantization", "q8", "weights in 8 bits", 1)
    if recipe.model.quantization in ("none", "q8"):
        yield Step("model.quantization", "nf4", "weights in 4 bits (QLoRA): close to 16 bits", 1)
    if everything:
        yield Step("adapter.kind", "lora", "an adapter instead of all weights", 1)
    elif not initial_adapter(recipe.adapter):
        yield from _less_adapter(plan)
    yield from _shorter(recipe, plan.rows)


def _less_adapter(plan: Plan) -> Iterator[Step]:
    adapter = plan.recipe.adapter
    fused = [w.path.split(".")[-2] for w in plan.spec.weights if w.fused and w.path in plan.trainable.ranks]
    if fused:
        without = [*adapter.exclude, *dict.fromkeys(fused)]
        yield Step("adapter.exclude", without, "no adapter on the experts, whose weights PEFT copies with theirs", 2)
    if adapter.train_modules:
        yield Step("adapter.train_modules", [], "embeddings and the like stay as they are", 2)
    if adapter.targets == "all-linear":
        yield Step("adapter.targets", "attention", "no adapter on the feed-forward layers: learns less", 2)
    for rank in (adapter.rank // 2, adapter.rank // 4):
        if rank >= 2:
            yield Step("adapter.rank", rank, "less to learn with (alpha stays)", 2)


def _shorter(recipe: Recipe, rows: RowEstimate) -> Iterator[Step]:
    """Lower limits of length, the highest first, that leave most of the rows; with the share that they do not leave."""
    length = min(recipe.data.max_length, rows.longest)
    most = _MOST_LOST if recipe.data.overlong in ("drop", "error") else _MOST_CUT
    for share in (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125):
        limit = int(share * length) // 32 * 32
        lost = _beyond(rows, limit)
        if limit < _SHORTEST or (lost is not None and lost > most):
            return
        told = "rows" if lost is None else f"{percent(lost, 1)} of the rows, those"
        yield Step("data.max_length", limit, f"{told} beyond {limit} tokens, are {_fate(recipe.data.overlong)}", 3)


def _beyond(rows: RowEstimate, limit: int) -> float | None:
    """The share of the rows that are longer; None where no row is known."""
    return sum(length > limit for length in rows.lengths) / len(rows.lengths) if rows.lengths else None


def _fate(overlong: str) -> str:
    return {"drop": "dropped", "truncate": "cut", "split": "split", "error": "refused"}[overlong]


def using_more(plan: Plan) -> Iterator[Step]:
    recipe, rows = plan.recipe, plan.rows
    train, model = recipe.train, recipe.model
    if train.gradient_checkpointing:
        yield Step("train.gradient_checkpointing", False, "blocks are computed once instead of twice", 0)
    if int(train.micro_batch) < train.batch_size:
        yield Step("train.micro_batch", train.batch_size, "fewer passes over the weights; the result is the same", 0)
    if model.quantization != "none":
        yield Step("model.quantization", "none", "nothing is lost to quantization, nothing is dequantized", 0)
    if rows.overlong > 0:
        longer = 2 * recipe.data.max_length
        yield Step("data.max_length", longer, f"keeps some of the {percent(rows.overlong)} of rows that are longer", 0)
    if not trains_all(recipe.adapter) and not initial_adapter(recipe.adapter) and recipe.adapter.rank < 64:
        yield Step("adapter.rank", 2 * recipe.adapter.rank, "more to learn with, where there are rows for it", 0)


def _written(value: Any) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(_item, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _item(text: str) -> str:
    """An item of a list: bare where it is a plain word, else in quotes, as patterns are."""
    return text if re.fullmatch(r"[A-Za-z_][\w.-]*", text) else json.dumps(text)
