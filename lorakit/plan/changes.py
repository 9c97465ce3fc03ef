"""What could be changed in a recipe: the least that makes it fit, or what would use the room that is left.

Each change is planned anew like the recipe itself, so that what is told of it is what the planner says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lorakit.errors import UserError
from lorakit.plan.facts import ModelFacts
from lorakit.plan.planned import Plan, Rows, plan_run
from lorakit.recipe.kinds import begins_from, kind_of, trains_all, unread
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

    Single changes; where none of them does it, several: one is added to the other, the cheapest first, until they fit,
    and those that turn out not to be needed are taken away again.
    """
    tried = sorted((step for step in _smaller(plan, facts) if _is_read(plan.recipe, step)), key=lambda one: one.quality)
    single = [change for step in tried if (change := _changed(plan, (step,), facts)) and _fits(change.plan)]
    if single:
        return sorted(_best(single), key=_cost)
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
    elif not begins_from(recipe.adapter):
        yield from _less_adapter(plan)
    yield from _shorter(recipe, plan.rows)


def _less_adapter(plan: Plan) -> Iterator[Step]:
    adapter = plan.recipe.adapter
    fused = [w.path.split(".")[-2] for w in plan.skeleton.weights if w.fused and w.path in plan.adapted.ranks]
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


def _shorter(recipe: Recipe, rows: Rows) -> Iterator[Step]:
    """Lower limits of length, the highest first, that leave most of the rows; with the share that they do not leave."""
    length = min(recipe.data.max_length, rows.longest)
    most = _MOST_LOST if recipe.data.overlong in ("drop", "error") else _MOST_CUT
    for share in (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125):
        limit = int(share * length) // 32 * 32
        lost = _beyond(rows, limit)
        if limit < _SHORTEST or (lost is not None and lost > most):
            return
        told = "rows" if lost is None else f"{lost:.1%} of the rows, those"
        yield Step("data.max_length", limit, f"{told} beyond {limit} tokens, are {_fate(recipe.data.overlong)}", 3)


def _beyond(rows: Rows, limit: int) -> float | None:
    """The share of the rows that are longer; None where no row is known."""
    return sum(length > limit for length in rows.lengths) / len(rows.lengths) if rows.lengths else None


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
            rows = _limited(rows, int(step.value), recipe.data.overlong)
    if not _is_taken(recipe):
        return None
    try:
        found = plan_run(recipe, facts, rows, plan.place)
    except UserError:
        return None
    slower = found.time.likely / plan.time.likely if found.time and plan.time else None
    return Change(steps, found, slower)


def _limited(rows: Rows, limit: int, overlong: str) -> Rows:
    """The rows under another limit of length."""
    if not rows.lengths:
        return replace(rows, longest=limit, mean=float(limit))
    dropped = overlong in ("drop", "error")
    kept = [length if dropped else min(length, limit) for length in rows.lengths if length <= limit or not dropped]
    count = round((rows.count or 0) * len(kept) / len(rows.lengths))
    # A higher limit lets in rows whose lengths are not known: the longest is taken to be as long as the limit.
    longest = limit if rows.overlong else min(rows.longest, limit)
    return replace(rows, count=count, longest=longest, mean=sum(kept) / len(kept), lengths=tuple(kept))


def _is_taken(recipe: Recipe) -> bool:
    """Whether the kind of adapter goes with the quantization and the optimizer."""
    facts = kind_of(recipe.adapter).facts
    quantizations, optimizers = facts.get("quantizations"), facts.get("optimizers")
    return not (
        (quantizations and recipe.model.quantization not in quantizations)
        or (optimizers and recipe.train.optimizer not in optimizers)
    )


def _fits(plan: Plan) -> bool:
    return plan.fits == "yes"


def _best(changes: list[Change]) -> list[Change]:
    """Of several values of one key, the first, which changes least; of quantizations the fastest."""
    best: dict[str, Change] = {}
    for change in changes:
        key = change.steps[0].key
        faster = key in best and (change.slower or 1.0) < (best[key].slower or 1.0)
        if key not in best or (key == "model.quantization" and faster):
            best[key] = change
    return list(best.values())


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
