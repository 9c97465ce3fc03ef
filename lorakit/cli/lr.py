"""`lorakit lr`"""

import json
import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.options import Json, Overrides, Quiet, RecipePath
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.sweep.rate_test import RateTest

_LEAST_STEPS = 20
_RATE = "train.learning_rate"


def lr(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=_LEAST_STEPS, help="Steps of the test.")] = 100,
    low: Annotated[float, typer.Option("--from", metavar="RATE", help="The lowest rate.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", metavar="RATE", help="The highest rate.")] = 1.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find learning rates to try: train some steps with a rate that rises, and look where the loss falls.

    What is trained is thrown away. The rates are a place to look, not an answer: [cyan]lorakit sweep[/cyan] compares
    them on held-out rows.
    """
    from lorakit import console
    from lorakit.recipe.load import load

    if not 0 < low < high:
        raise UserError(f"--from {low:g} --to {high:g}: expected rates above 0, the lower one first.")
    loaded = load(recipe, overrides)
    from lorakit.sweep.rate_test import run_rate_test

    with loaded.locating():
        result = run_rate_test(loaded.recipe, low, high, steps, console.Terminal(quiet))
    if as_json:
        console.result_json(result.to_dict())
        return
    _print(result)
    if result.suggested:
        values = ", ".join(f"{rate:g}" for rate in result.suggested)
        given = [override.replace("=", ": ", 1) for override in overrides if not override.startswith(_RATE)]
        lines = [f"extends: {json.dumps(str(recipe), ensure_ascii=False)}", *given, f"{_RATE}: [{values}]"]
        console.result("a sweep of them, rates.yaml in this folder:\n\n" + "\n".join(lines) + "\n")
        console.result("then: lorakit sweep rates.yaml")


def _print(result: "RateTest") -> None:
    """The loss by the rate's power of ten, and what it says."""
    import math

    from lorakit import console
    from lorakit.report.chart import Line
    from lorakit.report.watch import Frame, terminal_chart

    size = shutil.get_terminal_size()
    most = 1.5 * result.losses[0]  # where it explodes, the rest would be a flat line
    points = [(math.log10(rate), min(loss, most)) for rate, loss in zip(result.rates, result.smoothed, strict=True)]
    title = "loss a trained token by the learning rate's power of ten"
    chart = terminal_chart(title, [Line("", tuple(points))], min(size.columns, 100), min(size.lines - 4, 20))
    console.result_frame(Frame("", (chart,)))
    console.result(result.in_words())
