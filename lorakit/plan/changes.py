"""What could be changed in a recipe: the least that makes it fit, or what would use the memory that is left.

Each change is made by the recipe's own rules, as `--set` makes it, and planned again, so that its figures are the
planner's own.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.amounts import percent
from lorakit.errors import UserError
from lorakit.hardware.machine import has_own_memory
from lorakit.plan.auto import with_values
from lorakit.plan.estimate import Plan, RowEstimate, plan_run
from lorakit.plan.model_info import ModelInfo
from lorakit.recipe.adapter_kind import initial_adapter, trains_all, unread_keys
from lorakit.recipe.problem import RecipeErrors
from lorakit.recipe.schema import Recipe

# A lower limit of length is named where it drops, or cuts, at most so many of the rows; and the lowest limit named.
_MOST_DROPPED, _MOST_CUT, _SHORTEST = 0.05, 0.25, 64
_FATES = {"drop": "dropped", "truncate": "cut", "split": "split", "error": "refused"}


@dataclass(frozen=True)
class SettingChange:
    """One key set to another value, and what that costs besides memory."""

    key: str
    value: Any
    costs: str
    quality: int  # how much it may cost in quality: 0 nothing, 1 hardly, 2 some, 3 rows are lost

    @property
    def option(self) -> str:
        """The `--set` argument that does it."""
        value = json.dumps(self.value) if isinstance(self.value, list | bool) else self.value
        return f"{self.key}={value}"


@dataclass(frozen=True)
class Change:
    """One or several settings that together fit, as the plan of the changed recipe says."""

    steps: tuple[SettingChange, ...]
    plan: Plan
    slower: float | None  # its time over that of the recipe as it is; None where no time is known
    removed: tuple[str, ...] = ()  # keys that nothing would read any more, and that have to go for it to be valid

    @property
    def overrides(self) -> str:
        """The `--set` options that do it, quoted for a shell."""
        return " ".join(f"--set {shlex.quote(option)}" for option in _options(self.steps, self.removed))

    @property
    def costs(self) -> str:
        return "; ".join(dict.fromkeys(step.costs for step in self.steps))


@dataclass(frozen=True)
class ChangeSearch:
    """A plan to improve on."""

    plan: Plan
    info: ModelInfo
    reload: Callable[[Sequence[str]], Recipe]
    """The recipe as it is written, with more `--set` arguments; raises RecipeErrors where its rules refuse them."""

    def smaller(self) -> list[Change]:
        """Changes of a recipe that does not fit, each of which fits; what costs least in quality and time first. Single
        changes; where none of them is enough, several: the cheapest first, one is added to the other until they fit,
        and those that turn out not to be needed are taken away again."""
        steps = sorted(memory_reductions(self.plan, self.info), key=lambda step: step.quality)
        best: dict[str, Change] = {}
        for step in steps:
            change = self._fitting((step,))
            if change is None:
                continue
            # Of several values of one key the first changes least; of quantizations the fastest counts.
            faster = step.key in best and (change.slower or 1.0) < (best[step.key].slower or 1.0)
            if step.key not in best or (step.key == "model.quantization" and faster):
                best[step.key] = change
        if best:
            return sorted(best.values(), key=lambda change: (change.steps[0].quality, change.slower or 1.0))
        return self._combine(steps)

    def larger(self) -> list[Change]:
        """What would use more of the memory of a recipe that fits, each still fitting."""
        changes, used = [self._fitting((step,)) for step in memory_uses(self.plan)], self.plan.longest.total
        return [change for change in changes if change and change.plan.longest.total > used]

    def _combine(self, steps: list[SettingChange]) -> list[Change]:
        """The first steps that fit together, or nothing. A step that is refused waits for the next ones: full
        fine-tuning takes no quantization, the adapter that follows does."""
        applied, waiting = dict[str, SettingChange](), dict[str, SettingChange]()
        for step in steps:
            everything = applied | waiting | {step.key: step}
            change = self._apply(tuple(everything.values()))
            if change:
                applied, waiting = everything, {}
            elif change := self._apply(tuple((applied | {step.key: step}).values())):
                applied |= {step.key: step}
            else:
                waiting |= {step.key: step}
            if change and change.plan.fits == "yes":
                break
        else:
            return []
        for step in sorted(change.steps, key=lambda step: -step.quality):  # what is not needed is taken away again
            rest = tuple(other for other in change.steps if other is not step)
            change = (self._fitting(rest) if rest else None) or change
        return [change]

    def _fitting(self, steps: tuple[SettingChange, ...]) -> Change | None:
        """The plan with these steps where it fits."""
        change = self._apply(steps)
        return change if change and change.plan.fits == "yes" else None

    def _apply(self, steps: tuple[SettingChange, ...]) -> Change | None:
        """The plan with these steps; None where the changed recipe is refused, or cannot work."""
        plan, rows = self.plan, self.plan.rows
        for step in steps:
            if step.key == "data.max_length":
                rows = _limit_rows(rows, int(step.value), plan.requested.data.overlong)
        try:
            recipe, removed = self._changed_recipe(steps)
            changed = plan_run(recipe, self.info, rows, plan.machine, devices=plan.devices)
        except UserError:
            return None
        slower = changed.time.likely / plan.time.likely if changed.time and plan.time else None
        return Change(steps, changed, slower, removed)

    def _changed_recipe(self, steps: tuple[SettingChange, ...]) -> tuple[Recipe, tuple[str, ...]]:
        """The recipe with these steps, and its own keys that had to be removed since nothing would read them then;
        `RecipeErrors` where its rules refuse it for another reason."""
        try:
            return self.reload(_options(steps)), ()
        except RecipeErrors as refusal:
            recipe = with_values(self.plan.requested, {step.key: step.value for step in steps})
            faults = {problem.path for problem in refusal.problems} - {step.key for step in steps}
            removed = tuple(key for key in unread_keys(recipe) if key in faults)
            if not removed:
                raise
            return self.reload(_options(steps, removed)), removed


def memory_reductions(plan: Plan, info: ModelInfo) -> Iterator[SettingChange]:
    """What takes less memory."""
    recipe, wanted = plan.recipe, plan.requested.train
    on_gpu, quantization = plan.machine.is_gpu, recipe.model.quantization
    if wanted.micro_batch not in ("auto", 1):
        yield SettingChange("train.micro_batch", "auto", "the same result, in smaller pieces", 0)
    if wanted.gradient_checkpointing is False:
        yield SettingChange("train.gradient_checkpointing", True, "the same result, blocks computed twice", 0)
    if not wanted.offload_activations and has_own_memory(plan.machine) and recipe.train.sharding == "none":
        costs = "the same result, activations wait in main memory"
        yield SettingChange("train.offload_activations", True, costs, 0)
    if plan.devices.count > 1 and wanted.sharding == "none":
        yield SettingChange("train.sharding", "fsdp", "the same result, each device gathers weights from the others", 0)
    if recipe.model.attention == "eager" and "sdpa" in info.attentions:
        yield SettingChange("model.attention", "sdpa", "the same result within rounding", 0)
    states = "optimizer states in 8 bits"
    if recipe.train.optimizer == "adamw":
        yield SettingChange("train.optimizer", "adamw-8bit", states, 1)
    if on_gpu and recipe.train.optimizer in ("adamw", "adamw-8bit"):
        yield SettingChange("train.optimizer", "paged-adamw-8bit", f"{states}, in main memory when full", 1)
    if recipe.model.dtype == "float32" and quantization == "none" and on_gpu:
        yield SettingChange("model.dtype", "auto", "arithmetic in half precision", 1)
    if quantization == "none" and not (info.stored and info.stored.treatment == "kept"):
        yield SettingChange("model.quantization", "q8", "weights in 8 bits", 1)
    if quantization in ("none", "q8"):
        yield SettingChange("model.quantization", "nf4", "weights in 4 bits (QLoRA): close to 16 bits", 1)
    if trains_all(recipe.adapter):
        yield SettingChange("adapter.kind", "lora", "an adapter instead of all weights", 1)
    elif not initial_adapter(recipe.adapter):
        yield from _smaller_adapters(plan)
    yield from _shorter_rows(recipe, plan.rows)


def _smaller_adapters(plan: Plan) -> Iterator[SettingChange]:
    adapter = plan.recipe.adapter
    fused = [w.path.split(".")[-2] for w in plan.spec.weights if w.fused and w.path in plan.trainable.ranks]
    if fused:
        costs = "no adapter on the experts, whose weights PEFT copies with theirs"
        yield SettingChange("adapter.exclude", [*adapter.exclude, *dict.fromkeys(fused)], costs, 2)
    if adapter.train_modules:
        yield SettingChange("adapter.train_modules", [], "embeddings and the like stay as they are", 2)
    if adapter.targets == "all-linear":
        yield SettingChange("adapter.targets", "attention", "no adapter on the feed-forward layers: learns less", 2)
    for rank in (adapter.rank // 2, adapter.rank // 4):
        if rank >= 2:
            yield SettingChange("adapter.rank", rank, "less to learn with (alpha stays)", 2)


def _shorter_rows(recipe: Recipe, rows: RowEstimate) -> Iterator[SettingChange]:
    """Lower limits of length, the highest first, that leave most of the rows; with the share that they do not leave."""
    length, overlong = min(recipe.data.max_length, rows.longest), recipe.data.overlong
    for share in (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125):
        limit, count = int(share * length) // 32 * 32, len(rows.lengths)
        lost = sum(length > limit for length in rows.lengths) / count if count else None
        most = _MOST_DROPPED if overlong in ("drop", "error") else _MOST_CUT
        if limit < _SHORTEST or (lost is not None and lost > most):
            return
        which = "rows" if lost is None else f"{percent(lost, 1)} of the rows, those"
        yield SettingChange("data.max_length", limit, f"{which} beyond {limit} tokens, are {_FATES[overlong]}", 3)


def memory_uses(plan: Plan) -> Iterator[SettingChange]:
    """What takes more memory, and is worth it."""
    recipe, train = plan.recipe, plan.recipe.train
    if train.gradient_checkpointing:
        yield SettingChange("train.gradient_checkpointing", False, "blocks are computed once instead of twice", 0)
    part = -(-train.batch_size // plan.devices.count)  # the rows of a step that one device computes
    if int(train.micro_batch) < part:
        costs = "fewer passes over the weights; the result is the same"
        yield SettingChange("train.micro_batch", part, costs, 0)
    if recipe.model.quantization != "none":
        yield SettingChange("model.quantization", "none", "nothing is lost to quantization, nothing is dequantized", 0)
    if plan.rows.overlong > 0:
        costs = f"keeps some of the {percent(plan.rows.overlong)} of rows that are longer"
        yield SettingChange("data.max_length", 2 * recipe.data.max_length, costs, 0)
    if not trains_all(recipe.adapter) and not initial_adapter(recipe.adapter) and recipe.adapter.rank < 64:
        yield SettingChange("adapter.rank", 2 * recipe.adapter.rank, "more to learn with, where there are many rows", 0)


def _options(steps: Sequence[SettingChange], removed: Sequence[str] = ()) -> list[str]:
    return [*(step.option for step in steps), *(f"{key}=null" for key in removed)]


def _limit_rows(rows: RowEstimate, limit: int, overlong: str) -> RowEstimate:
    """The rows under another limit of length."""
    if not rows.lengths:
        return replace(rows, longest=limit, mean=float(limit))
    dropped = overlong in ("drop", "error")
    lengths = [length if dropped else min(length, limit) for length in rows.lengths if length <= limit or not dropped]
    count = round((rows.count or 0) * len(lengths) / len(rows.lengths))
    # A higher limit lets in rows whose lengths are not known: the longest is taken to be as long as the limit.
    longest = limit if rows.overlong else min(rows.longest, limit)
    return replace(rows, count=count, longest=longest, mean=sum(lengths) / len(lengths), lengths=tuple(lengths))
