"""How many rows go through the model at once, and whether activations are computed twice to fit more of them."""

import math
from collections.abc import Iterator
from typing import Any

from lorakit.amounts import counted, gibibytes
from lorakit.hardware.gpus import slowest_gpu
from lorakit.hardware.machine import Machine
from lorakit.hardware.throughput import gpu_throughput
from lorakit.plan.fit import SizedRun, memory_budget, size_run
from lorakit.plan.flops import run_workload
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.runtime import training_seconds
from lorakit.recipe.schema import Recipe


def choose_micro_batch(
    recipe: Recipe, machine: Machine, info: ModelInfo | None, longest: int, mean: float
) -> Iterator[tuple[str, Any, str]]:
    """`gradient_checkpointing` and `micro_batch` where they are `auto`: name, value, and why.

    Args:
        recipe: with dtype, attention, packing and optimizer resolved.
        longest: tokens of the longest row, which has to fit; mean: of the average one, which decides the time.
    """
    train = recipe.train
    names = [name for name in ("gradient_checkpointing", "micro_batch") if getattr(train, name) == "auto"]
    if not names:
        return
    if info is None or info.spec is None:
        values = {"gradient_checkpointing": False, "micro_batch": min(8, train.batch_size)}
        yield from ((name, values[name], "what fits is known when the model is built") for name in names)
        return
    run = size_run(recipe, info, info.spec, machine.is_gpu)
    checkpointing = train.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing, reason = _choose_checkpointing(run, machine, longest, mean)
        yield "gradient_checkpointing", checkpointing, reason
    if "micro_batch" in names:
        yield "micro_batch", *_choose_rows(run, machine, longest, bool(checkpointing))


def _choose_checkpointing(run: SizedRun, machine: Machine, longest: int, mean: float) -> tuple[bool, str]:
    """Gradient checkpointing where the rows do not fit without it, or where it is planned to be faster.

    It computes up to half as much again, for which larger micro-batches have to make up: fewer reads of the weights and
    fewer kernels to start. On a GPU the times of both decide. On a processor products take nearly all of the time,
    however few the rows, and a speed that comes out otherwise each time it is measured must not decide: it recomputes
    only where not even one row fits without.
    """
    train, budget = run.recipe.train, memory_budget(machine)
    place = f"{gibibytes(budget)} of {machine.name}"
    least, most = (1, train.batch_size) if train.micro_batch == "auto" else (int(train.micro_batch),) * 2
    plain = run.largest_micro_batch(longest, False, most, budget)
    if plain < least:
        return True, f"{_takes(run, least, longest, False)} without it, and {place} may be used"
    if plain == most:
        return False, f"{_takes(run, most, longest, False)} without it, which fit into {place}"
    recomputing = run.largest_micro_batch(longest, True, most, budget)
    if recomputing <= plain:
        return False, f"with it no more rows of {longest} tokens would fit into {place} than the {plain} without it"
    if not machine.is_gpu:
        return False, f"{plain} rows fit into {place} without it; more rows give less than computing blocks twice costs"
    # Of a card that is not known, what `lorakit plan --gpu` takes for its memory alone is near enough to compare by.
    card = machine.card or slowest_gpu(machine.memory)
    rates = gpu_throughput(card, run.recipe.model.dtype)
    once = training_seconds(run_workload(run, plain, False, length=mean), rates).likely
    twice = training_seconds(run_workload(run, recomputing, True, length=mean), rates).likely
    source = "" if machine.card else f" at the rates of the {card.name}, for those of this card are not known"
    plain_words = f"{counted(plain, 'row')} at once without it"
    recomputing_words = f"{counted(recomputing, 'row')} at once with it"
    if twice < once:
        return True, f"{recomputing_words} is planned faster than {plain_words}: x {twice / once:.2f}{source}"
    return False, f"{plain_words} is planned faster than {recomputing_words}: x {once / twice:.2f}{source}"


def _choose_rows(run: SizedRun, machine: Machine, longest: int, checkpointing: bool) -> tuple[int, str]:
    """As many rows as fit, in even parts of the batch: 16 rows go as 8 + 8, not as 9 + 7."""
    budget, most = memory_budget(machine), run.recipe.train.batch_size
    rows = run.largest_micro_batch(longest, checkpointing, most, budget)
    even = math.ceil(most / math.ceil(most / rows)) if rows else 1
    place, need = f"{gibibytes(budget)} of {machine.name}", _takes(run, even, longest, checkpointing)
    if rows == 0:
        return even, f"even {need}, more than {place}: lorakit plan says what would fit"
    if rows == most:
        return even, f"the whole batch fits: {need} of the {place}"
    return even, f"{need}; at most {rows} rows fit into {place}"


def _takes(run: SizedRun, rows: int, length: int, checkpointing: bool) -> str:
    return f"{rows} x {length} tokens take {gibibytes(run.memory(rows, length, checkpointing).total)}"
