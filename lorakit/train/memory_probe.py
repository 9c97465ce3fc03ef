"""The probe: the longest micro-batch of a run, tried before the run to measure its memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from lorakit.amounts import gibibytes
from lorakit.errors import LorakitError
from lorakit.hardware.memory import OutOfMemory, measure_peak, within_memory
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.train.batch_sampler import count_trained_tokens
from lorakit.train.micro_batching import (
    MicroBatchRunner,
    compute_optimizations,
    set_gradient_checkpointing,
    uses_gradient_checkpointing,
)
from lorakit.train.optimizer import state_bytes, states_do_not_fit
from lorakit.train.setup import TrainingState, set_up_training


@dataclass(frozen=True)
class ProbeResult:
    """What the longest micro-batch of a run takes, forward and backward, with room reserved for the optimizer's states.

    Memory is in bytes: on a GPU that of torch's tensors, on a CPU that of the process.
    """

    micro_batch: int
    tokens: int
    """Rows x length of the batch tried, with padding."""
    peak: int
    before: int
    """Before the pass: the weights, the room for the states, and on a CPU the program."""
    seconds: float
    halved: tuple[int, ...]
    """Micro-batches that did not fit."""
    gradient_checkpointing: bool
    """As the recipe has it, or turned on because not even one row fitted."""
    reserved: int
    """`peak` with what torch keeps on a GPU between tensors, which other processes cannot use."""
    exact: bool
    """False where the system tells only the peak since the process began: `peak` is then an upper bound."""


def probe_run(prepared: Prepared, progress: Progress) -> ProbeResult:
    """Load the model of a run, attach its adapter, and probe.

    Raises:
        UserError, LorakitError: as `set_up_training` and `probe`.
    """
    return probe(set_up_training(prepared, None, progress), prepared, progress, times=2)


def probe(state: TrainingState, prepared: Prepared, progress: Progress, times: int = 1) -> ProbeResult:
    """Try the longest micro-batch of a run: the longest rows there are, packed where the run packs.

    In training mode and exactly as training computes, in micro-batches half as large where memory runs out. The
    model, its gradients and the random generators are left as they were. Several times: memory is the most of all, the
    seconds are those of the last, since the first also warms up.

    Raises:
        LorakitError: not even one row fits.
    """
    runner = MicroBatchRunner(state, prepared, progress)
    checkpointing = uses_gradient_checkpointing(state.model)
    set_gradient_checkpointing(state.model, bool(prepared.recipe.train.gradient_checkpointing))
    try:
        with compute_optimizations(state.model, prepared.recipe.model.dtype):
            results = [probe_longest(runner) for _ in range(times)]
    finally:
        set_gradient_checkpointing(state.model, checkpointing)
    return replace(
        results[-1],
        peak=max(result.peak for result in results),
        reserved=max(result.reserved for result in results),
        before=min(result.before for result in results),
        halved=tuple(size for result in results for size in result.halved),
    )


def probe_longest(runner: MicroBatchRunner, step: int = 1) -> ProbeResult:
    """Try the longest micro-batch in `runner`, which goes on with what fits; `step` is the one that comes next."""
    train, examples = runner.recipe.train, runner.prepared.train
    order = sorted(enumerate(examples.lengths().tolist()), key=lambda row: -row[1])
    rows = [examples.rows[index] for index, _ in order[: train.batch_size]]
    packs, tokens, halved = runner.layout.pack(rows), count_trained_tokens(rows), []
    with _restoring_modes(runner):
        # Filled, since the system gives a CPU no memory for an empty tensor.
        size = state_bytes(runner.model, train.optimizer)
        room = within_memory(lambda: torch.full((size,), 1, dtype=torch.uint8, device=runner.device))
        if isinstance(room, OutOfMemory):
            raise LorakitError(states_do_not_fit(runner.model, train.optimizer, "before training"))
        while True:
            some = packs[: runner.micro_batch]
            with measure_peak(runner.device) as memory:
                start = time.monotonic()
                result = within_memory(partial(runner.run_micro_batch, some, tokens, step))
            seconds = time.monotonic() - start  # `measure_peak` has waited for the GPU
            if not isinstance(result, OutOfMemory):
                break
            runner.drop_gradients()
            halved.append(len(some))
            runner.shrink("in the probe of the longest rows", step, some, result)
        del room
    return ProbeResult(
        micro_batch=runner.micro_batch,
        tokens=runner.layout.collate(some)["input_ids"].numel(),
        peak=memory.peak,
        before=memory.before,
        seconds=seconds,
        halved=tuple(halved),
        gradient_checkpointing=uses_gradient_checkpointing(runner.model),
        reserved=memory.reserved,
        exact=memory.exact,
    )


def describe_probe(result: ProbeResult, memory: int, expected: int | None) -> str:
    """The result on one line; `memory` is the device's, `expected` what was predicted, in bytes."""
    words = f"probe: the longest micro-batch, {result.tokens:,} tokens, takes {gibibytes(result.peak)} at the most"
    if expected and not result.halved:
        words += f", predicted {gibibytes(expected)} ({expected / result.peak - 1:+.0%})"
    return f"{words}, of {gibibytes(memory)}"


@contextmanager
def _restoring_modes(runner: MicroBatchRunner) -> Iterator[None]:
    """Training mode within; modes, gradients and random generators afterwards as before."""
    model, device = runner.model, runner.device
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for module, training in modes:
                module.training = training
