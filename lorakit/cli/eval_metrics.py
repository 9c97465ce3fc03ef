"""The values of `lorakit eval --metrics` and `--fail-under`: metrics by name, and scores below which it fails."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.evaluate.results import Evaluation

_ALWAYS = ("loss", "perplexity", "loss-per-character")


@dataclass(frozen=True)
class Threshold:
    """The worst value that a score may have. `written`: as it stands on the command line."""

    name: str
    value: float
    written: str


def check_metrics(named: str) -> None:
    """Refuse an unknown metric before anything is read; settings are looked up when the recipe is known."""
    from lorakit.registry import METRICS

    metrics_of(named, [name for name in METRICS.names() if METRICS[name].settings])


def metrics_of(named: str, recipes: Sequence[Any]) -> tuple[Any, ...]:
    """The metrics of `--metrics a,b`: those that a recipe gives settings have these settings.

    Raises:
        UserError: there is no such metric, it is there twice, or it needs settings that no recipe gives.
    """
    from lorakit.recipe.did_you_mean import nearest
    from lorakit.recipe.fields import entry_name
    from lorakit.registry import METRICS

    configured = {entry_name(metric): metric for metric in recipes}
    names = [name.strip() for name in named.split(",")]
    metrics = []
    for name in names:
        if name not in METRICS:
            near = nearest(name, METRICS.names())
            remedy = f"Did you mean {near}?" if near else f"There are {', '.join(METRICS.names())}."
            raise UserError(f"--metrics: {name!r} is not a metric. {remedy}")
        settings = METRICS[name].settings
        needed = [key for key, field in settings.model_fields.items() if field.is_required()] if settings else []
        if needed and name not in configured:
            raise UserError(
                f"--metrics: {name} needs settings ({', '.join(needed)}), which only a recipe can give: write it under "
                "evaluate.metrics there."
            )
        metrics.append(configured.get(name, name))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--metrics: {twice} is there twice. Leave one out.")
    return tuple(metrics)


def thresholds_of(written: Iterable[str], metrics: Sequence[Any]) -> list[Threshold]:
    """`metric=value` as thresholds; a share may be written as 0.8 or as 80%.

    Raises:
        UserError: one is malformed, or names what is not measured.
    """
    from lorakit.recipe.fields import entry_name

    measured = [*_ALWAYS, *map(entry_name, metrics)]
    thresholds = []
    for text in written:
        name, equals, value = (part.strip() for part in text.partition("="))
        number = _number(value)
        if not (name and equals) or number is None:
            raise UserError(f"--fail-under: {text!r} is not a score with its value. Write for example exact-match=0.8.")
        if name.partition(".")[0] not in measured and "label-" not in name:
            raise UserError(f"--fail-under: {name!r} is not measured. Write one of {', '.join(measured)}.")
        thresholds.append(Threshold(name, number, text))
    return thresholds


def _number(text: str) -> float | None:
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def failures(evaluation: "Evaluation", thresholds: Iterable[Threshold]) -> list[str]:
    """What is worse than its threshold: of every model but the baseline, or of that where it is alone.

    Raises:
        UserError: a threshold's score is none that was measured.
    """
    failed = []
    for one in thresholds:
        for model in evaluation.others or [evaluation.baseline]:
            scores: Mapping[str, Any] = evaluation.scores[model.name]
            if one.name not in scores:
                raise UserError(f"--fail-under: {one.name!r} is not measured here. Write one of {', '.join(scores)}.")
            measure = scores[one.name].measure
            value, above = measure.value, measure.higher is False
            if math.isnan(value) or (value > one.value if above else value < one.value):
                side = "above" if above else "under"
                failed.append(f"{model.name}: {one.name} is {measure.write(value)}, {side} {measure.write(one.value)}")
    return failed
