"""The probe: the longest micro-batch of a run, tried once before the run, to see what it takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lorakit.amounts import gibibytes
from lorakit.errors import LorakitError
from lorakit.hardware.memory import OutOfMemory, PeakMemory, measure_peak, within_memory
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.train.arguments import plan_of
from lorakit.train.batch_sampler import Pack, collate_packs, count_trained_tokens, pack_rows
from lorakit.train.gradient_checkpointing import set_gradient_checkpointing, uses_gradient_checkpointing
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.optimizer import state_bytes, states_do_not_fit
from lorakit.train.setup import TrainingState, set_up_training


@dataclass(frozen=True)
class ProbeResult:
    """What the longest micro-batch of a run takes, forward and backward, with room held for the optimizer's states."""

    micro_batch: int
    tokens: int
    """Rows x length of the batch tried, with padding."""
    peak: int
    """The most that was held, in bytes: on a GPU by torch's tensors, on a CPU by the process."""
    before: int
    """Held before the pass, in bytes: the weights, the room for the states, and on a CPU the program."""
    seconds: float
    halved: tuple[int, ...]
    """Micro-batches that did not fit."""
    gradient_checkpointing: bool
    """As it was asked for, or turned on because not even one row fitted."""
    reserved: int
    """`peak` with what torch keeps on a GPU between tensors: what other processes cannot have."""
    exact: bool
    """False where the system told only the peak since the process began: `peak` is then an upper bound."""


def probe(begun: TrainingState, prepared: Prepared, progress: Progress) -> ProbeResult:
    """Try the longest micro-batch of a run: the longest rows there are, packed where the run packs.

    In training mode and exactly as training computes, in micro-batches half as large where memory runs out. The
    model, its gradients and the random generators are left as they were.

    Raises:
        LorakitError: not even one row fits.
    """
    model, recipe = begun.model, prepared.recipe
    passes = MicroBatchRunner(begun, recipe, plan_of(prepared), progress)
    checkpointing = uses_gradient_checkpointing(model)
    set_gradient_checkpointing(model, bool(recipe.train.gradient_checkpointing))
    try:
        with compute_optimizations(model, recipe.model.dtype):
            return try_longest_micro_batch(passes, prepared)
    finally:
        set_gradient_checkpointing(model, checkpointing)


def probe_run(prepared: Prepared, progress: Progress) -> ProbeResult:
    """Load the model of a run, attach its adapter, and probe twice: the first time also warms up.

    Memory is the most of both, the seconds are those of the second.

    Raises:
        UserError, LorakitError: as `begin` and `probe`.
    """
    begun = set_up_training(prepared, None, progress)
    first = probe(begun, prepared, progress)
    train = prepared.recipe.train.model_copy(
        update={"micro_batch": first.micro_batch, "gradient_checkpointing": first.gradient_checkpointing}
    )
    second = probe(begun, replace(prepared, recipe=prepared.recipe.model_copy(update={"train": train})), progress)
    return replace(
        second,
        peak=max(first.peak, second.peak),
        reserved=max(first.reserved, second.reserved),
        before=min(first.before, second.before),
        halved=(*first.halved, *second.halved),
    )


def describe_probe(found: ProbeResult, memory: int, expected: int | None) -> str:
    """What was found, on one line; `memory` is the device's, `expected` what was predicted, in bytes."""
    said = f"probe: the longest micro-batch, {found.tokens:,} tokens, takes {gibibytes(found.peak)} at the most"
    if expected and not found.halved:
        said += f", predicted {gibibytes(expected)} ({expected / found.peak - 1:+.0%})"
    return f"{said}, of {gibibytes(memory)}"


def try_longest_micro_batch(passes: MicroBatchRunner, prepared: Prepared, step: int = 1) -> ProbeResult:
    """Try the longest micro-batch in `passes`, which keep what fits; `step` is the one that comes after."""
    rows = _longest_rows(prepared)
    units, tokens, halved = pack_rows(rows, passes.plan), count_trained_tokens(rows), []
    with _left_as_it_was(passes), _room_for_states(passes, prepared):
        while True:
            some = units[: passes.micro_batch]
            found, memory, seconds = _once(passes, some, tokens, step)
            if not isinstance(found, OutOfMemory):
                break
            passes.forget()
            halved.append(len(some))
            passes.shrink("in the probe of the longest rows", step, some, found)
    return ProbeResult(
        micro_batch=passes.micro_batch,
        tokens=collate_packs(some, passes.plan)["input_ids"].numel(),
        peak=memory.peak,
        before=memory.before,
        seconds=seconds,
        halved=tuple(halved),
        gradient_checkpointing=uses_gradient_checkpointing(passes.model),
        reserved=memory.reserved,
        exact=memory.exact,
    )


def _once(passes: MicroBatchRunner, units: list[Pack], tokens: int, step: int) -> tuple[Any, PeakMemory, float]:
    with measure_peak(passes.device) as memory:
        mark = time.monotonic()
        found = within_memory(partial(passes.micro_batch_through, units, tokens, step))
    return found, memory, time.monotonic() - mark  # `measured` has waited for the GPU


def _longest_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """As many of the longest rows as a step has."""
    order = sorted(enumerate(prepared.train.lengths().tolist()), key=lambda row: -row[1])
    return [prepared.train.rows[index] for index, _ in order[: prepared.recipe.train.batch_size]]


@contextmanager
def _left_as_it_was(passes: MicroBatchRunner) -> Iterator[None]:
    """Training mode within; modes, gradients and random generators afterwards as before."""
    model, device = passes.model, passes.device
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for module, training in modes:
                module.training = training


@contextmanager
def _room_for_states(passes: MicroBatchRunner, prepared: Prepared) -> Iterator[None]:
    """Holds as much memory as the optimizer's states take from the first step on, so that later ones fit too."""
    optimizer = prepared.recipe.train.optimizer
    size = state_bytes(passes.model, optimizer)
    # Filled: of an empty one, a processor's system gives no page.
    room = within_memory(lambda: torch.full((size,), 1, dtype=torch.uint8, device=passes.device))
    if isinstance(room, OutOfMemory):
        raise LorakitError(states_do_not_fit(passes.model, optimizer, "before training"))
    yield
    del room
