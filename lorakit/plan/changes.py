"""What could be changed in a recipe: the least that makes it fit, or what would use the room that is left.

Each change is made by the recipe's own rules, as `--set` makes it, and planned anew, so that what is told of it is what
the planner says.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lorakit.errors import UserError
from lorakit.plan.candidates import Step, lessening, using_more
from lorakit.plan.estimate import Plan, RowEstimate, plan_run
from lorakit.plan.model_info import ModelInfo
from lorakit.recipe.adapter_kind import unread_keys
from lorakit.recipe.problem import RecipeErrors
from lorakit.recipe.schema import Recipe

Written = Callable[[Sequence[str]], Recipe]
"""The recipe as it is written, with more `--set` arguments; raises RecipeErrors where its rules refuse them."""


@dataclass(frozen=True)
class Change:
    """One or several steps that together fit, as the plan of the changed recipe says."""

    steps: tuple[Step, ...]
    plan: Plan
    slower: float | None
    """Its time over that of the recipe as it is; None where no time is known."""
    emptied: tuple[str, ...] = ()
    """Keys of the recipe that nothing would read any more, and that have to go for it to be valid."""

    @property
    def overrides(self) -> str:
        """The `--set` options that do it, quoted for a shell."""
        return " ".join(f"--set {shlex.quote(option)}" for option in _options(self.steps, self.emptied))

    @property
    def costs(self) -> str:
        return "; ".join(dict.fromkeys(step.costs for step in self.steps))


@dataclass(frozen=True)
class Trying:
    """A plan whose recipe is changed."""

    plan: Plan
    facts: ModelInfo
    written: Written


def smaller(trying: Trying) -> list[Change]:
    """Changes of a recipe that does not fit, each of which fits; what costs least in quality and time first.

    Single changes; where none of them does it, several: one is added to the other, the cheapest first, until they fit,
    and those that turn out not to be needed are taken away again.
    """
    tried = sorted(lessening(trying.plan, trying.facts), key=lambda one: one.quality)
    changes = [(step, _changed(trying, (step,))) for step in tried]
    single = [change for _, change in changes if change and _fits(change.plan)]
    if single:
        return sorted(_best(single), key=_cost)
    return _several(trying, tried)


def _several(trying: Trying, tried: list[Step]) -> list[Change]:
    """The first steps that fit together, or nothing.

    A step that is refused waits for the next ones: full fine-tuning takes no quantization, the adapter that follows
    does.
    """
    taken: dict[str, Step] = {}
    waiting: dict[str, Step] = {}
    for step in tried:
        all_of_them = taken | waiting | {step.key: step}
        found = _changed(trying, tuple(all_of_them.values()))
        if found:
            taken, waiting = all_of_them, {}
        elif found := _changed(trying, tuple((taken | {step.key: step}).values())):
            taken |= {step.key: step}
        else:
            waiting |= {step.key: step}
        if found and _fits(found.plan):
            return [_without_needless(found, trying)]
    return []


def larger(trying: Trying) -> list[Change]:
    """What would use the room of a recipe that fits with room to spare, each still fitting."""
    changes = [_changed(trying, (step,)) for step in using_more(trying.plan)]
    return [
        change
        for change in changes
        if change and _fits(change.plan) and change.plan.longest.total > trying.plan.longest.total
    ]


def _changed(trying: Trying, steps: tuple[Step, ...]) -> Change | None:
    """The plan with steps taken; None where the changed recipe is refused, or cannot work."""
    plan, rows = trying.plan, trying.plan.rows
    for step in steps:
        if step.key == "data.max_length":
            rows = _limited(rows, int(step.value), plan.asked.data.overlong)
    try:
        recipe, emptied = _accepted(trying, steps)
        found = plan_run(recipe, trying.facts, rows, plan.place)
    except UserError:
        return None
    slower = found.time.likely / plan.time.likely if found.time and plan.time else None
    return Change(steps, found, slower, emptied)


def _accepted(trying: Trying, steps: tuple[Step, ...]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with steps taken, and its own keys that had to be taken out since nothing would read them then.

    Raises:
        RecipeErrors: its rules refuse it for another reason.
    """
    try:
        return trying.written(_options(steps)), ()
    except RecipeErrors as refused:
        recipe, own = trying.plan.asked, {step.key for step in steps}
        for step in steps:
            section, name = step.key.split(".")
            changed = getattr(recipe, section).model_copy(update={name: step.value})
            recipe = recipe.model_copy(update={section: changed})
        faults = {problem.path for problem in refused.problems}
        emptied = tuple(key for key in unread_keys(recipe) if key in faults - own)
        if not emptied:
            raise
        return trying.written(_options(steps, emptied)), emptied


def _options(steps: Sequence[Step], emptied: Sequence[str] = ()) -> list[str]:
    return [*(step.option for step in steps), *(f"{key}=null" for key in emptied)]


def _limited(rows: RowEstimate, limit: int, overlong: str) -> RowEstimate:
    """The rows under another limit of length."""
    if not rows.lengths:
        return replace(rows, longest=limit, mean=float(limit))
    dropped = overlong in ("drop", "error")
    kept = [length if dropped else min(length, limit) for length in rows.lengths if length <= limit or not dropped]
    count = round((rows.count or 0) * len(kept) / len(rows.lengths))
    # A higher limit lets in rows whose lengths are not known: the longest is taken to be as long as the limit.
    longest = limit if rows.overlong else min(rows.longest, limit)
    return replace(rows, count=count, longest=longest, mean=sum(kept) / len(kept), lengths=tuple(kept))


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


def _without_needless(change: Change, trying: Trying) -> Change:
    """The same with every step left out that is not needed, the dearest in quality first."""
    for step in sorted(change.steps, key=lambda one: -one.quality):
        rest = tuple(other for other in change.steps if other is not step)
        other = _changed(trying, rest) if rest else None
        if other and _fits(other.plan):
            change = other
    return change
