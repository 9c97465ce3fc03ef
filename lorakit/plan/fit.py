"""Whether a recipe fits a machine, by the memory model, and in which micro-batches: the same answer for `auto`,
`lorakit plan` and its remedies."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.amounts import counted, gibibytes
from lorakit.hardware.gpus import slowest_gpu
from lorakit.hardware.machine import Machine
from lorakit.hardware.throughput import gpu_throughput
from lorakit.model.spec import ModelSpec
from lorakit.plan.activations import TrainingStep
from lorakit.plan.checkpoint import effective_quantization
from lorakit.plan.memory import Memory, peak_memory
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.runtime import run_workload, training_seconds
from lorakit.plan.trainable_params import TrainableParams, count_trainable
from lorakit.recipe.adapter_kind import adapter_spec
from lorakit.recipe.schema import Recipe

# The share of a device's memory that a run may be planned to take: the rest is the model's error, and what the
# allocator cannot give back in one piece. On a processor, of the memory that is free: the system and other programs.
_SHARE = {"cuda": 0.92, "cpu": 0.85}


@dataclass(frozen=True)
class SizedRun:
    """A recipe on a model: all that memory depends on but the rows and tokens of a micro-batch."""

    recipe: Recipe  # with dtype, attention, packing and optimizer resolved
    spec: ModelSpec
    trainable: TrainableParams
    quantization: str  # the quantization in which the base is really held
    on_gpu: bool

    def step(self, rows: int, length: int, checkpointing: bool) -> TrainingStep:
        """A step with micro-batches of so many rows, each of so many tokens."""
        recipe = self.recipe
        packed, flash = recipe.data.packing == "on", recipe.model.attention == "flash_attention_2"
        return TrainingStep(
            rows=rows,
            length=length,
            trained=rows * length,
            dtype=recipe.model.dtype,
            quantization=self.quantization,
            double_quant=recipe.model.double_quant,
            attention=recipe.model.attention,
            checkpointing=checkpointing,
            masked=not (packed and flash) and (packed or rows > 1),
            dropout=recipe.adapter.dropout,
            optimizer=recipe.train.optimizer,
            accumulates=rows < recipe.train.batch_size,
            on_gpu=self.on_gpu,
        )

    def memory(self, rows: int, length: int, checkpointing: bool) -> Memory:
        return peak_memory(self.spec, self.trainable, self.step(rows, length, checkpointing))

    def largest_micro_batch(self, length: int, checkpointing: bool, most: int, budget: int) -> int:
        """The most rows, up to `most`, that fit into so many bytes; 0 where not even one row does."""
        return bisect_right(range(1, most + 1), budget, key=lambda rows: self.memory(rows, length, checkpointing).total)


def size_run(recipe: Recipe, info: ModelInfo, spec: ModelSpec, on_gpu: bool) -> SizedRun:
    """A recipe on a model, on a GPU or a processor; a `UserError` where its adapter chooses what the model does not
    have."""
    quantization, _ = effective_quantization(recipe.model, adapter_spec(recipe.adapter).quantizes, info)
    if quantization in ("gptq", "awq"):  # 4 or 8 bits with scales, in either form
        quantization = "q8" if info.stored and info.stored.bits == 8 else "nf4"
    return SizedRun(recipe, spec, count_trainable(spec, recipe.adapter), quantization, on_gpu)


def memory_budget(machine: Machine) -> int:
    """The bytes of a machine's memory that a run may be planned to take."""
    return int(machine.memory * _SHARE[machine.device])


def choose_micro_batch(
    recipe: Recipe, machine: Machine, info: ModelInfo | None, longest: int, mean: float
) -> Iterator[tuple[str, Any, str]]:
    """`gradient_checkpointing` and `micro_batch` where they are `auto`: name, value, and why. The recipe's other
    choices are made; the longest row has to fit, the average one decides the time."""
    checkpointing, micro_batch = recipe.train.gradient_checkpointing, recipe.train.micro_batch
    if "auto" not in (checkpointing, micro_batch):
        return
    unknown = "what fits is known when the model is built"
    run = size_run(recipe, info, info.spec, machine.is_gpu) if info and info.spec else None
    if checkpointing == "auto":
        checkpointing, reason = _choose_checkpointing(run, machine, longest, mean) if run else (False, unknown)
        yield "gradient_checkpointing", checkpointing, reason
    if micro_batch == "auto" and run:
        yield "micro_batch", *_choose_rows(run, machine, longest, bool(checkpointing))
    elif micro_batch == "auto":
        yield "micro_batch", min(8, recipe.train.batch_size), unknown


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
    words = [f"{counted(plain, 'row')} at once without it", f"{counted(recomputing, 'row')} at once with it"]
    faster, slower = reversed(words) if twice < once else words
    factor = min(once, twice) / max(once, twice)
    return twice < once, f"{faster} is planned faster than {slower}: x {factor:.2f}{source}"


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
