"""A plan: what a run will hold, take and cost, from the model's config and an estimate of its rows."""

import math
from dataclasses import dataclass, field, replace
from random import Random
from statistics import fmean
from typing import Any

from lorakit.data.figures import FigureSupport
from lorakit.data.micro_batches import cut_micro_batches, padded_tokens
from lorakit.data.mixture import Mixture
from lorakit.distributed.sharing import deal
from lorakit.hardware.devices import ONE_DEVICE, Devices
from lorakit.hardware.machine import Machine, Throughput, throughput_of
from lorakit.model.spec import ModelSpec
from lorakit.plan.auto import Choice, resolve_auto, with_values
from lorakit.plan.memory import DTYPE_BYTES, Memory, SizedRun, evaluation_memory, memory_budget, merge_memory, size_run
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.runtime import (
    TRAINED_SHARE,
    EstimateRange,
    Workload,
    run_workload,
    seconds_together,
    training_price,
    training_seconds,
    workload_of_one,
)
from lorakit.plan.schedule import occurrences
from lorakit.plan.sharding import Transfer
from lorakit.plan.trainable_params import TrainableParams
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.schema import Adapter, Recipe

# What the memory model was off by at most, against published and measured figures; and of the few families whose own
# code could not be followed on the meta device, where not everything that it keeps is counted (docs/planning.md).
ERROR, ERROR_UNSEEN = 0.15, 0.6

# Batches that are shuffled, sorted by length and cut together (lorakit/data/batches.py).
_POOL = 32


@dataclass(frozen=True)
class RowEstimate:
    """What is known of the rows. Without any, every row is as long as `data.max_length` allows."""

    count: int | None  # drawn an epoch on average
    held_out: int
    longest: int
    mean: float
    trained: float
    overlong: float
    counted: str
    broken: int = 0  # of the rows looked at, those that cannot be read
    exact: bool = False  # whether `count` and `held_out` are the run's own
    mixture: Mixture | None = None  # the rows of each source and their weights
    figures: FigureSupport | None = None  # None where no row is a prompt and an answer
    sample: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    lengths: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Plan:
    """The answers of `lorakit plan`. Bytes, seconds; spans are ranges that the estimate should lie in."""

    requested: Recipe
    recipe: Recipe  # the same without `auto`
    choices: tuple[Choice, ...]
    machine: Machine
    load: SizedRun
    rows: RowEstimate
    longest: Memory  # the fullest moment on the longest micro-batch
    average: Memory  # the same with rows of average length
    room: int  # bytes that a run may be planned to take
    fits: str  # yes (within `room`), tight (within the device's memory, but not within `room`), or no
    evaluation: int
    merge: int  # main memory, whatever the device: a merge is computed on the processor
    adapter_file: int
    model_file: int  # the merged model, or what full fine-tuning leaves
    steps: int | None
    padding: float
    work: Workload | None  # of all devices
    sent: tuple[Transfer, ...]  # by each device in a step
    computing: float | None  # seconds that the busiest device computes
    time: EstimateRange | None
    rates: Throughput | None
    price: EstimateRange | None

    @property
    def devices(self) -> Devices:
        return self.load.devices

    @property
    def spec(self) -> ModelSpec:
        return self.load.spec

    @property
    def trainable(self) -> TrainableParams:
        return self.load.trainable

    @property
    def offloaded(self) -> int:
        """The bytes of activations that a micro-batch leaves in main memory, those of each device."""
        train = self.recipe.train
        return self.load.offloaded(int(train.micro_batch), self.rows.longest, bool(train.gradient_checkpointing))

    @property
    def error(self) -> float:
        """How far the memory may be off, as a share."""
        return ERROR_UNSEEN if self.spec.built and not self.spec.extra_bytes else ERROR

    @property
    def at_most(self) -> int:
        """The bytes that the fullest moment takes at the upper end of the estimate."""
        return math.ceil(self.longest.total * (1 + self.error))

    @property
    def certain(self) -> bool:
        """Whether it fits, or does not, at either end of the estimate."""
        if self.fits == "no":
            return self.longest.total * (1 - self.error) > self.machine.memory
        return self.at_most <= self.machine.memory


def assume_rows(max_length: int, reason: str) -> RowEstimate:
    """Rows of which nothing is known: each as long as the recipe allows."""
    counted = f"{reason}: every row is taken to be {max_length} tokens long (data.max_length)"
    return RowEstimate(None, 0, max_length, float(max_length), TRAINED_SHARE, 0.0, counted)


def plan_run(
    recipe: Recipe,
    facts: ModelInfo,
    rows: RowEstimate,
    machine: Machine,
    per_hour: float | None = None,
    devices: Devices = ONE_DEVICE,
) -> Plan:
    """The plan of a recipe on a model whose spec is known; a `UserError` where the recipe cannot work on this device,
    or chooses what the model does not have. `per_hour`: the price of a device an hour, in any currency; `devices`: how
    many like the machine's train together."""
    spec = facts.spec
    assert spec is not None
    settled, choices = resolve_auto(
        recipe, machine, facts, rows.longest, mean=rows.mean, devices=devices, rows=rows.count
    )
    load = size_run(settled, facts, spec, machine.is_gpu, devices, machine.memory if machine.is_gpu else 0)
    train = settled.train
    micro, checkpointing = int(train.micro_batch), bool(train.gradient_checkpointing)
    longest = load.memory(micro, rows.longest, checkpointing)
    steps, work = _steps(settled, rows), None
    micro_batches, padding = count_micro_batches(settled, rows, micro, devices.count)
    if steps:
        scored = occurrences(train.eval_every, steps) * rows.held_out * rows.mean if rows.held_out else 0
        shape: dict[str, Any] = {"length": rows.mean, "trained": rows.trained, "steps": steps, "padding": padding}
        work = run_workload(load, micro_batches * devices.count, checkpointing, held_out=round(scored), **shape)
    rates = throughput_of(machine, settled.model.dtype) if work else None
    sent = load.transfers(min(micro, load.rows), rows.longest, checkpointing, micro_batches)
    computing = time = _computing(work, load, rates) if work and rates else None
    if time and work and devices.link:
        time = seconds_together(time, work, sent, devices.link)
    allowed = memory_budget(machine)
    return Plan(
        requested=recipe,
        recipe=settled,
        choices=choices,
        machine=machine,
        load=load,
        rows=rows,
        longest=longest,
        average=load.memory(micro, max(1, round(rows.mean)), checkpointing),
        room=allowed,
        fits="yes" if longest.total <= allowed else "tight" if longest.total <= machine.memory else "no",
        evaluation=evaluation_memory(load, rows.longest, machine),
        merge=merge_memory(spec),
        adapter_file=4 * load.trainable.saved,  # in float32
        model_file=spec.parameters * DTYPE_BYTES.get(str(facts.dtype), 2),
        steps=steps,
        padding=padding,
        work=work,
        sent=sent,
        computing=computing.likely if computing else None,
        time=time,
        rates=rates,
        price=training_price(time, devices.count * per_hour) if time and per_hour is not None else None,
    )


def _computing(work: Workload, load: SizedRun, rates: Throughput) -> EstimateRange:
    """Seconds that the busiest device computes. The processes of a processor share its cores."""
    parts = 1 if load.on_gpu else load.devices.count
    own = replace(rates, compute=rates.compute / parts, bandwidth=rates.bandwidth / parts)
    return training_seconds(workload_of_one(work, load), own)


def _steps(recipe: Recipe, rows: RowEstimate) -> int | None:
    """The optimizer steps of a run; None where neither they nor the rows are known."""
    if recipe.train.steps or not rows.count:
        return recipe.train.steps
    mixture = rows.mixture or Mixture((rows.count,), (1.0,))
    return mixture.run_steps(recipe.train.batch_size, recipe.train.epochs, None)


def count_micro_batches(recipe: Recipe, rows: RowEstimate, micro: int, devices: int = 1) -> tuple[float, float]:
    """The micro-batches that the busiest device computes in a step, on average, and the share of computed tokens that
    is padding: steps are put together and cut as training does it, with room for `micro` of the longest rows."""
    batch, budget = recipe.train.batch_size, micro * max(rows.longest, 1)
    if recipe.data.packing == "on":  # packs are nearly full
        return max(1.0, math.ceil(batch / devices) * rows.mean / budget), 0.0
    if not rows.lengths:
        return len(cut_micro_batches([round(rows.mean)] * math.ceil(batch / devices), budget)), 0.0
    order = list(rows.lengths)
    Random(0).shuffle(order)
    pool = _POOL * batch
    pools = [sorted(order[first : first + pool], reverse=True) for first in range(0, len(order), pool)]
    steps = [some[at : at + batch] for some in pools for at in range(0, len(some), batch)]
    steps = [step for step in steps if len(step) == batch] or steps
    shares = [[deal(step, number, devices) for number in range(devices)] for step in steps]
    cuts = [[(share, cut_micro_batches(share, budget)) for share in step if share] for step in shares]
    computed = sum(padded_tokens(share[part]) for step in cuts for share, parts in step for part in parts)
    most = [max(len(parts) for _, parts in step) for step in cuts]
    return fmean(most), 1 - sum(map(sum, steps)) / computed


def full_fine_tuning(
    recipe: Recipe, facts: ModelInfo, rows: RowEstimate, machine: Machine, devices: Devices = ONE_DEVICE
) -> Plan | None:
    """The same run without an adapter, for comparison; None where the recipe is that already."""
    if trains_all(recipe.adapter):
        return None
    values: dict[str, Any] = {"model.quantization": "none", "train.lora_plus": None}
    values |= dict.fromkeys(("train.micro_batch", "train.gradient_checkpointing"), "auto")
    full = recipe.model_copy(update={"adapter": Adapter.model_validate({"kind": "none"})})
    plain = replace(facts, stored=None)  # a checkpoint that is quantized already has its plain one beside it
    return plan_run(with_values(full, values), plain, rows, machine, devices=devices)
