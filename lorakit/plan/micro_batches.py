"""How many rows go through the model at once, and whether activations are computed twice to fit more of them."""

import math
from collections.abc import Iterator
from typing import Any

from lorakit.amounts import gibibytes
from lorakit.hardware.gpus import slowest_gpu
from lorakit.hardware.machine import Machine
from lorakit.hardware.throughput import gpu_throughput
from lorakit.plan.fit import SizedRun, largest_micro_batch, memory_budget, size_run
from lorakit.plan.flops import run_workload
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.runtime import training_seconds
from lorakit.recipe.schema import Recipe


def choose_micro_batch(
    recipe: Recipe, machine: Machine, facts: ModelInfo | None, longest: int, mean: float
) -> Iterator[tuple[str, Any, str]]:
    """`gradient_checkpointing` and `micro_batch` where they are `auto`: name, value, and why.

    Args:
        recipe: with dtype, attention, packing and optimizer settled.
        longest: tokens of the longest row, which has to fit; mean: of the average one, which the time hangs on.
    """
    train = recipe.train
    asked = [name for name in ("gradient_checkpointing", "micro_batch") if getattr(train, name) == "auto"]
    if not asked:
        return
    if facts is None or facts.spec is None:
        unknown = "what fits is known when the model is built"
        values = {"gradient_checkpointing": False, "micro_batch": min(8, train.batch_size)}
        yield from ((name, values[name], unknown) for name in asked)
        return
    load = size_run(recipe, facts, facts.spec, machine.is_gpu)
    checkpointing = train.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing, reason = _checkpointing(load, machine, longest, mean)
        yield "gradient_checkpointing", checkpointing, reason
    if "micro_batch" in asked:
        yield "micro_batch", *_micro_batch(load, machine, longest, bool(checkpointing))


def _checkpointing(load: SizedRun, machine: Machine, longest: int, mean: float) -> tuple[bool, str]:
    """Gradient checkpointing where the rows do not fit without it, or where it is planned to be faster.

    It computes up to half as much again, for which larger micro-batches have to make up: fewer reads of the weights and
    fewer kernels to start. On a GPU the times of both say which is less. On a processor products take nearly all of
    the time, however few the rows, and a speed that comes out otherwise each time it is measured must not decide: it
    recomputes only where not even one row fits without.
    """
    train, budget = load.recipe.train, memory_budget(machine)
    most = train.batch_size if train.micro_batch == "auto" else int(train.micro_batch)
    place = f"{gibibytes(budget)} of {machine.name}"
    plain = largest_micro_batch(load, longest, False, most, budget)
    least = most if train.micro_batch != "auto" else 1
    if plain < least:
        return True, f"{_takes(load, least, longest, False)} without it, and {place} may be used"
    if plain == most:
        return False, f"{_takes(load, most, longest, False)} without it, which fit into {place}"
    recomputing = largest_micro_batch(load, longest, True, most, budget)
    if recomputing <= plain:
        return False, f"with it no more rows of {longest} tokens would fit into {place} than the {plain} without it"
    if not machine.is_gpu:
        return False, f"{plain} rows fit into {place} without it; more rows give less than computing blocks twice costs"
    return _faster(load, machine, plain, recomputing, mean)


def _faster(load: SizedRun, machine: Machine, plain: int, recomputing: int, mean: float) -> tuple[bool, str]:
    """Whether a step is planned faster with checkpointing and more rows; of a tie no."""
    # Of a card that is not known, what `lorakit plan --gpu` takes for its memory alone is near enough to compare by.
    card = machine.card or slowest_gpu(machine.memory)
    rates = gpu_throughput(card, load.recipe.model.dtype)
    once = training_seconds(run_workload(load, plain, False, length=mean), rates).likely
    twice = training_seconds(run_workload(load, recomputing, True, length=mean), rates).likely
    whose = "" if machine.card else f" at the rates of the {card.name}, for those of this card are not known"
    faster = twice < once
    share = min(once, twice) / max(once, twice)
    pair = (_at_once(recomputing, "with"), _at_once(plain, "without"))
    quick, slow = pair if faster else pair[::-1]
    return faster, f"{quick} is planned faster than {slow}: x {share:.2f}{whose}"


def _at_once(rows: int, how: str) -> str:
    return f"{rows} row{'s' * (rows > 1)} at once {how} it"


def _takes(load: SizedRun, rows: int, length: int, checkpointing: bool) -> str:
    needed = load.memory(rows, length, checkpointing).total
    return f"{rows} x {length} tokens take {gibibytes(needed)}"


def _micro_batch(load: SizedRun, machine: Machine, longest: int, checkpointing: bool) -> tuple[int, str]:
    """As many rows as fit, in even parts of the batch: 16 rows go as 8 + 8, not as 9 + 7."""
    budget, most = memory_budget(machine), load.recipe.train.batch_size
    rows = largest_micro_batch(load, longest, checkpointing, most, budget)
    even = math.ceil(most / math.ceil(most / rows)) if rows else 1
    place = f"{gibibytes(budget)} of {machine.name}"
    fits = _takes(load, even, longest, checkpointing)
    if rows == 0:
        return even, f"even {fits}, more than {place}: lorakit plan says what would fit"
    if rows == most:
        return even, f"the whole batch fits: {fits} of the {place}"
    return even, f"{fits}; at most {rows} rows fit into {place}"
