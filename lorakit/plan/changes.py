"""What could be changed in a recipe: the least that makes it fit, or what would use the room that is left.

Each change is planned anew like the recipe itself, so that what is told of it is what the planner says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.errors import UserError
from lorakit.plan.facts import ModelFacts
from lorakit.plan.planned import Plan, Rows, plan_run
from lorakit.recipe.kinds import begins_from, kind_of, trains_all, unread
from lorakit.recipe.schema import Recipe


@dataclass(frozen=True)
class Step:
    """One key set to another value, and what that costs besides memory."""

    key: str
    value: Any
    costs: str
    quality: int
    """How much it may cost in quality: 0 nothing, 1 hardly, 2 some, 3 it is another training."""


@dataclass(frozen=True)
class Change:
    """One or several steps that together fit, as the plan of the changed recipe says."""

    steps: tuple[Step, ...]
    plan: Plan
    slower: float | None
    """Its time over that of the recipe as it is; None where no time is known."""

    @property
    def overrides(self) -> str:
        """The `--set` options that do it."""
        return " ".join(f"--set {step.key}={_written(step.value)}" for step in self.steps)

    @property
    def costs(self) -> str:
        return "; ".join(dict.fromkeys(step.costs for step in self.steps))


def smaller(plan: Plan, facts: ModelFacts) -> list[Change]:
    """Changes of a recipe that does not fit, each of which fits; what costs least in quality and time first.

    Single changes; where none of them does it, the shortest row of them that does, one added to the other.
    """
    tried = [step for step in _smaller(plan, facts) if _is_read(plan.recipe, step)]
    single = [change for step in tried if (change := _changed(plan, (step,), facts)) and _fits(change.plan)]
    if single:
        return sorted(_least(single), key=_cost)
    taken: dict[str, Step] = {}
    for step in tried:
        taken[step.key] = step
        change = _changed(plan, tuple(taken.values()), facts)
        if change and _fits(change.plan):
            return [_without_needless(change, plan, facts)]
    return []


def larger(plan: Plan, facts: ModelFacts) -> list[Change]:
    """What would use the room of a recipe that fits with room to spare, each still fitting."""
    found = []
    for step in _larger(plan):
        change = _changed(plan, (step,), facts) if _is_read(plan.recipe, step) else None
        if change and _fits(change.plan) and change.plan.longest.total > plan.longest.total:
            found.append(change)
    return found


def _smaller(plan: Plan, facts: ModelFacts) -> Iterator[Step]:
    """What takes less memory, from what costs nothing in quality to what costs most."""
    recipe, rows, asked = plan.recipe, plan.rows, plan.asked.train
    train, adapter = recipe.train, recipe.adapter
    if asked.micro_batch not in ("auto", 1):
        yield Step("train.micro_batch", "auto", "the same result, in smaller pieces", 0)
    if asked.gradient_checkpointing is False:
        yield Step("train.gradient_checkpointing", True, "the same result, blocks computed twice", 0)
    if recipe.model.dtype == "float32" and recipe.model.quantization == "none":
        yield Step("model.dtype", "auto", "arithmetic in half precision where the device has it", 1)
    optimizers = kind_of(adapter).facts.get("optimizers")
    if train.optimizer == "adamw" and not optimizers:
        yield Step("train.optimizer", "paged-adamw-8bit", "optimizer states in 8 bits, in main memory when full", 1)
    if not trains_all(adapter) and not (facts.stored and facts.stored.treatment == "kept"):
        allowed = kind_of(adapter).facts.get("quantizations")
        for word, costs in (("q8", "weights in 8 bits"), ("nf4", "weights in 4 bits (QLoRA): close to 16 bits")):
            if recipe.model.quantization == "none" and (not allowed or word in allowed):
                yield Step("model.quantization", word, costs, 1)
        if recipe.model.quantization == "q8":
            yield Step("model.quantization", "nf4", "weights in 4 bits (QLoRA): close to 16 bits", 1)
    if recipe.model.attention == "eager":
        yield Step("model.attention", "sdpa", "the same result within rounding", 0)
    yield from _shorter(recipe, rows)
    if trains_all(adapter):
        yield Step("adapter.kind", "lora", "an adapter instead of all weights", 3)
        return
    fused = [w.path.split(".")[-2] for w in plan.skeleton.weights if w.fused and w.path in plan.adapted.ranks]
    if fused and not begins_from(adapter):
        without = [*adapter.exclude, *dict.fromkeys(fused)]
        yield Step("adapter.exclude", without, "no adapter on the experts, whose weights PEFT copies with theirs", 2)
    if adapter.targets == "all-linear":
        yield Step("adapter.targets", "attention", "no adapter on the feed-forward layers: learns less", 2)
    for rank in (8, 4):
        if adapter.rank > rank and not begins_from(adapter):
            yield Step("adapter.rank", rank, "less to learn with (alpha stays)", 2)


def _shorter(recipe: Recipe, rows: Rows) -> Iterator[Step]:
    """Lower limits of length, with the share of rows that go beyond where rows are known."""
    length = min(recipe.data.max_length, rows.longest)
    for limit in (2048, 1024, 512, 256):
        if limit < length:
            over = f"rows beyond {limit} tokens are {_fate(recipe.data.overlong)}"
            yield Step("data.max_length", limit, over, 2)


def _fate(overlong: str) -> str:
    return {"drop": "dropped", "truncate": "cut", "split": "split", "error": "refused"}[overlong]


def _larger(plan: Plan) -> Iterator[Step]:
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
        yield Step("data.max_length", longer, f"keeps some of the {rows.overlong:.0%} of rows that are longer", 0)
    if not trains_all(recipe.adapter) and not begins_from(recipe.adapter) and recipe.adapter.rank < 64:
        yield Step("adapter.rank", 2 * recipe.adapter.rank, "more to learn with, where there are rows for it", 0)


def _is_read(recipe: Recipe, step: Step) -> bool:
    """Whether the recipe takes the key at all: some adapter kinds refuse some, an adapter that goes on has its own."""
    return step.key not in unread(recipe)


def _changed(plan: Plan, steps: tuple[Step, ...], facts: ModelFacts) -> Change | None:
    """The plan with steps taken; None where the changed recipe cannot work."""
    recipe, rows = plan.asked, plan.rows
    for step in steps:
        section, name = step.key.split(".")
        changed = getattr(recipe, section).model_copy(update={name: step.value})
        recipe = recipe.model_copy(update={section: changed})
        if step.key == "data.max_length":
            limit = int(step.value)
            longest = limit if rows.overlong or rows.longest > limit else rows.longest
            rows = Rows(**{**rows.__dict__, "longest": longest, "mean": min(rows.mean, float(limit))})
    try:
        found = plan_run(recipe, facts, rows, plan.target)
    except UserError:
        return None
    slower = found.time.likely / plan.time.likely if found.time and plan.time else None
    return Change(steps, found, slower)


def _fits(plan: Plan) -> bool:
    return plan.fits == "yes"


def _least(changes: list[Change]) -> list[Change]:
    """Of several values of one key, the one that changes least."""
    first: dict[str, Change] = {}
    for change in changes:
        first.setdefault(change.steps[0].key, change)
    return list(first.values())


def _cost(change: Change) -> tuple[int, float]:
    return max(step.quality for step in change.steps), change.slower or 1.0


def _without_needless(change: Change, plan: Plan, facts: ModelFacts) -> Change:
    """The same with every step left out that is not needed, the dearest in quality first."""
    for step in sorted(change.steps, key=lambda one: -one.quality):
        rest = tuple(other for other in change.steps if other is not step)
        other = _changed(plan, rest, facts) if rest else None
        if other and _fits(other.plan):
            change = other
    return change


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
