"""What a plan knows that advice is given from."""

from lorakit.errors import UserError
from lorakit.plan.advice import RunFigures
from lorakit.plan.auto import default_learning_rate
from lorakit.plan.changes import Change
from lorakit.plan.estimate import Plan, plan_run
from lorakit.plan.model_info import ModelInfo


def known_of(plan: Plan, changes: list[Change], facts: ModelInfo) -> RunFigures:
    """The numbers of a plan, as far as they are known."""
    rows, recipe = plan.rows, plan.recipe
    formula, reason = default_learning_rate(recipe, facts)
    used = recipe.train.learning_rate
    adapted = [weight for weight in plan.spec.weights if weight.path in plan.trainable.ranks]
    return RunFigures(
        rows=rows.count,
        held_out=rows.held_out if rows.count else None,
        longest=rows.longest if rows.count else None,
        overlong=rows.overlong,
        trained_tokens=round(rows.count * rows.mean * rows.trained) if rows.count else None,
        parameters=plan.trainable.trained,
        steps=plan.steps,
        learning_rate=used if isinstance(used, float) else None,
        formula_rate=formula if isinstance(formula, float) else None,
        formula=reason,
        padding=plan.padding,
        smallest_side=min((min(weight.outer, weight.inner) for weight in adapted), default=None),
        fits_unquantized=any(step.key == "model.quantization" for change in changes for step in change.steps)
        if plan.fits == "yes" and recipe.model.quantization != "none"
        else None,
        fits_adamw=_fits_adamw(plan, facts) if recipe.train.optimizer.endswith("8bit") else None,
        texts=rows.sample,
    )


def _fits_adamw(plan: Plan, facts: ModelInfo) -> bool | None:
    train = plan.asked.train.model_copy(update={"optimizer": "adamw"})
    try:
        return plan_run(plan.asked.model_copy(update={"train": train}), facts, plan.rows, plan.place).fits == "yes"
    except UserError:
        return None
