"""A learning-rate range test (Smith, arXiv 1506.01186): the rate rises from step to step, and the loss says from where
on a model learns, and from where on it no longer does."""

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from lorakit.errors import Interrupted, LorakitError
from lorakit.prepare import prepare_run
from lorakit.progress import Progress
from lorakit.recipe.schema import Recipe
from lorakit.run_dir import open_run
from lorakit.train.run import train
from lorakit.train.trainer import TrainingHooks

_SMOOTHED = 2.0  # steps
_LEAST_FALL = 0.02  # of the loss at the start


@dataclass(frozen=True)
class RateTest:
    """The loss of each step at its learning rate. `steepest`: where it falls most; `suggested`: up to three rates
    to compare, none where no rate helped."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggested: tuple[float, ...]
    steepest: float | None = None

    def to_dict(self) -> dict[str, Any]:
        points = [{"learning_rate": rate, "loss": loss} for rate, loss in zip(self.rates, self.losses, strict=True)]
        return {"suggested": list(self.suggested), "steps": points}

    def in_words(self) -> str:
        if not self.suggested:
            return "no rate between these made the loss fall: look at the rows, or try --to with a higher rate"
        at = int(np.argmin(self.smoothed))
        turns = (
            ", the highest rate tried: try --to with a higher one" if at == len(self.rates) - 1 else ", where it turns"
        )
        return f"the loss falls most around {self.steepest:.2g} and is lowest at {self.rates[at]:.2g}{turns}"


def run_rate_test(recipe: Recipe, low: float, high: float, steps: int, progress: Progress) -> RateTest:
    """Train a recipe for some steps with rates that rise evenly in their logarithm; what is trained is thrown away."""
    changes = {"steps": steps, "epochs": None, "learning_rate": high, "warmup": 0, "schedule": "constant"}
    changes |= {"eval_every": steps + 1, "save_every": steps + 1, "early_stopping": None}
    settings = recipe.train.model_copy(update=changes)
    data = recipe.data.model_copy(update={"eval": None})
    losses: list[tuple[float, float]] = []
    with TemporaryDirectory() as folder, open_run(Path(folder) / "run", resume=False, overwrite=False) as run:
        output = recipe.output.model_copy(update={"dir": str(run.folder), "merged": False, "export": []})
        prepared = prepare_run(recipe.model_copy(update={"train": settings, "data": data, "output": output}), progress)
        hooks = TrainingHooks(rate_share=lambda step: (low / high) ** (1 - min(step, steps - 1) / (steps - 1)))
        try:
            train(prepared, run, progress, None, hooks)
        except Interrupted:
            raise
        except LorakitError:  # the rate became too high for any loss; what came before says enough
            if not any(True for _ in run.read_log("loss")):
                raise
        lines = reversed(list(run.read_log("loss")))
        losses = [(line["learning_rate"], line["loss"]) for line in lines if _is_finite(line)]
    return read_rate_test(losses)


def read_rate_test(losses: list[tuple[float, float]]) -> RateTest:
    """What rates with their losses, in the order of the steps, suggest: from where the loss falls most steeply to a
    third of where it is lowest."""
    if not losses:
        raise LorakitError("not one loss was a number: the rates are too high from the first. Write a lower --from.")
    rates, values = (np.array(column) for column in zip(*losses, strict=True))
    smoothed = gaussian_filter1d(values, _SMOOTHED, mode="nearest")
    lowest = int(np.argmin(smoothed))
    has_fallen = smoothed[0] - smoothed[lowest] > _LEAST_FALL * abs(smoothed[0])
    suggested: tuple[float, ...] = ()
    steep: float | None = None
    if has_fallen and lowest > 1:
        steepest = int(np.argmin(np.gradient(smoothed[: lowest + 1])))
        steep = float(rates[steepest])
        ends = sorted((math.log(rates[steepest]), math.log(rates[lowest] / 3)))
        places = (ends[0], (ends[0] + ends[1]) / 2, ends[1])
        suggested = tuple(dict.fromkeys(float(f"{math.exp(place):.1g}") for place in places))
    each = tuple(map(float, rates)), tuple(map(float, values)), tuple(map(float, smoothed))
    return RateTest(*each, suggested, steep)


def _is_finite(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(key), float | int) and math.isfinite(line[key]) for key in ("loss", "learning_rate"))
