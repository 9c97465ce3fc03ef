"""What a recipe's fractions are in steps: the warm-up, how often is evaluated and saved, the rate of each step."""

import math

from lorakit.amounts import counted
from lorakit.recipe.schema import Train

# A fraction of a short run would score all held-out rows after nearly every step; a number of steps is taken as it is.
LEAST_INTERVAL = 5


def interval_steps(every: float, steps: int) -> int:
    """A number of steps, or a fraction of the run as steps: at least 5, or half of a shorter run."""
    if isinstance(every, int):
        return every
    return max(round(every * steps), min(LEAST_INTERVAL, math.ceil(steps / 2)))


def occurrences(every: float, steps: int) -> int:
    """How often in a run something happens that is done at an interval and after the last step."""
    return math.ceil(steps / interval_steps(every, steps))


def warmup_steps(settings: Train, steps: int) -> int:
    """The steps in which the learning rate rises; a fraction leaves the run a step after them."""
    if isinstance(settings.warmup, int):
        return settings.warmup
    return min(round(settings.warmup * steps), steps - 1)


def rate_share(step: int, schedule: str, warmup: int, steps: int, least: float = 0.0) -> float:
    """The share of the peak rate that the step behind `step` others learns with. It rises evenly from above zero, since
    a step at rate 0 trains nothing, and falls to the share `least` as transformers' schedules do."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    shares = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return least + (1 - least) * max(0.0, shares[schedule])


def describe_schedule(settings: Train, steps: int, held_out: bool) -> list[str]:
    """What is told before a run begins: its steps and rate, and when it evaluates and saves."""
    warmup = warmup_steps(settings, steps)
    rises = f"after {counted(warmup, 'step')} of warm-up" if warmup else "no warm-up"
    falls = f" to {settings.min_rate:.3g} of it" if settings.min_rate else ""
    lines = [
        f"steps: {steps:,} of {counted(settings.batch_size, 'row')}; learning rate "
        f"{float(settings.learning_rate):.3g}, {settings.schedule}{falls}, {rises}"
    ]
    evaluated = [("held-out loss", "eval_every")] if held_out else []
    for what, key in (*evaluated, ("checkpoints", "save_every")):
        every: float = getattr(settings, key)
        number = occurrences(every, steps)
        at = f"every {counted(interval_steps(every, steps), 'step')} and " if number > 1 else ""
        lines.append(f"{what}: {counted(number, 'time')}, {at}after the last step")
    return lines
