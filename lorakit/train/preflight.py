"""What is tried before a run: its loss on two rows, its longest micro-batch, and room for the optimizer's states."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lorakit.amounts import gibibytes
from lorakit.data.batches import collate, collate_packed
from lorakit.distributed.processes import any_of, rank, refuse, world_size
from lorakit.distributed.sharing import deal
from lorakit.errors import LorakitError, UserError
from lorakit.hardware.memory import OutOfMemory, measure_peak, within_memory
from lorakit.model.fused_lora import fused_lora
from lorakit.model.loss import EXACT, HALF, full_logits_loss, is_causal, losses_agree, supervised_loss
from lorakit.model.tokenizer import pad_token_id
from lorakit.plan.auto import Choice, with_values
from lorakit.plan.trainable_params import LEAST_PAGED
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.attention import ATTENTIONS
from lorakit.train.batch_layout import MicroBatch, count_trained_tokens
from lorakit.train.block_check import choose_block_code
from lorakit.train.micro_batching import MicroBatchRunner, autocast, compute_optimizations
from lorakit.train.offloading import offload_activations
from lorakit.train.setup import set_up_training
from lorakit.train.sharding import WHOLE, Pass, Sharding, plain_pass
from lorakit.train.trial import restoring_modes, two_rows

# bitsandbytes leaves the states of smaller tensors in 32 bits (its optim/optimizer.py, min_8bit_size).
_LEAST_IN_8_BITS = 4096
# Numbers that share a scale in 8-bit states (its functional.py).
_BLOCK = 256


@dataclass(frozen=True)
class ProbeResult:
    """What the longest micro-batch of a run takes, forward and backward, with room reserved for the optimizer's states.

    `tokens` are rows x length of the batch tried, with padding; `halved` the micro-batches that did not fit;
    `gradient_checkpointing` may be on because not even one row fitted. The rest is as in `PeakMemory`, in bytes;
    `before` has the weights, the room for the states, and on a CPU the program.
    """

    micro_batch: int
    tokens: int
    peak: int
    before: int
    seconds: float
    halved: tuple[int, ...]
    gradient_checkpointing: bool
    reserved: int
    exact: bool


def probe_run(prepared: Prepared, progress: Progress) -> ProbeResult:
    """Load the model of a run, attach its adapter, and probe it twice, since the first pass also warms up: memory is
    the most of both, the seconds are those of the second. LorakitError where not even one row fits."""
    runner = MicroBatchRunner(set_up_training(prepared, None, progress), prepared, progress)
    offloading = offload_activations(runner.model, prepared.recipe.train.offload_activations)
    with compute_optimizations(runner.model, prepared.recipe.model.dtype, choose_block_code(runner)), offloading:
        first, second = probe_longest(runner), probe_longest(runner)
    peak, reserved = max(first.peak, second.peak), max(first.reserved, second.reserved)
    before, halved = min(first.before, second.before), first.halved + second.halved
    return replace(second, peak=peak, reserved=reserved, before=before, halved=halved)


def probe_longest(runner: MicroBatchRunner, step: int = 1) -> ProbeResult:
    """Try the longest micro-batch of a run, the longest rows there are, packed where the run packs: in training mode
    and exactly as training computes, in micro-batches half as large where memory runs out.

    `runner` goes on with what fits; modes, gradients and random generators are left as they were. `step` is the one
    that comes next.
    """
    train, examples = runner.recipe.train, runner.prepared.train
    order = sorted(enumerate(examples.lengths().tolist()), key=lambda row: -row[1])
    rows = [examples.rows[index] for index, _ in order[: train.batch_size]]
    share = deal(rows, rank(), world_size()) or rows[-1:]
    packs, tokens = runner.layout.pack(share), count_trained_tokens(rows)
    halved: list[int] = []
    with restoring_modes(runner):
        # Filled, since the system gives a CPU no memory for an empty tensor.
        size = state_bytes(runner.model, train.optimizer, runner.sharding)
        room = within_memory(lambda: torch.full((size,), 1, dtype=torch.uint8, device=runner.device))
        if any_of(isinstance(room, OutOfMemory)) == (True,):
            refuse(LorakitError(states_do_not_fit(runner.model, train.optimizer, "before training", runner.sharding)))
        while True:
            some = runner.layout.first_full(packs, runner.micro_batch)
            batch = runner.layout.collate(some)
            with measure_peak(runner.device) as memory:
                start = time.monotonic()
                work = partial(_run_batch, runner, batch, tokens, step)
                result = runner.sharding.attempt(partial(within_memory, work))
            seconds = time.monotonic() - start  # `measure_peak` has waited for the GPU
            if not (shortages := runner.shortages(some, result)):
                break
            runner.drop_gradients()
            halved.append(runner.micro_batch)
            runner.shrink("in the probe of the longest rows", step, shortages)
        del room
    return ProbeResult(
        micro_batch=runner.micro_batch,
        tokens=batch.tensors["input_ids"].numel(),
        seconds=seconds,
        halved=tuple(halved),
        gradient_checkpointing=runner.recomputes,
        **vars(memory),
    )


def _run_batch(runner: MicroBatchRunner, batch: MicroBatch, tokens: int, step: int) -> None:
    runner.run_micro_batch(batch.to(runner.device), tokens, step)


def describe_probe(result: ProbeResult, prepared: Prepared) -> str:
    """The result and what was predicted, on one line."""
    words = f"probe: the longest micro-batch, {result.tokens:,} tokens, takes {gibibytes(result.peak)} at the most"
    if prepared.expected and not result.halved:
        expected = prepared.expected.allocated
        words += f", predicted {gibibytes(expected)} ({expected / result.peak - 1:+.0%})"
    return f"{words}, of {gibibytes(prepared.machine.memory)}"


def state_bytes(model: Any, optimizer: str, sharding: Sharding = WHOLE) -> int:
    """What the optimizer's two states of every number that this process trains take on the model's device, from the
    first step on."""
    total = 0
    for parameter in map(sharding.local, _trained(model)):
        size = parameter.numel()
        if "paged" in optimizer and parameter.device.type != "cpu" and size >= LEAST_PAGED:
            continue
        if optimizer.endswith("8bit") and size >= _LEAST_IN_8_BITS:
            total += 2 * (size + 4 * -(-size // _BLOCK))
        else:
            total += 2 * size * (parameter.element_size() if optimizer == "adamw" else 4)
    return total


def states_do_not_fit(model: Any, optimizer: str, when: str, sharding: Sharding = WHOLE) -> str:
    """The message where memory runs out while the optimizer makes its states."""
    smaller = "" if "8bit" in optimizer else "optimizer: adamw-8bit or paged-adamw-8bit, "
    return (
        f"out of memory {when}: the optimizer's states of {sum(p.numel() for p in _trained(model)):,} trained "
        f"parameters take {gibibytes(state_bytes(model, optimizer, sharding))}. Its step cannot be done again in "
        f"parts. Write {smaller}a smaller adapter.rank or fewer adapter.targets; lorakit plan tells what fits."
    )


def _trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_loss(model: Any, prepared: Prepared, run: Pass = plain_pass) -> Prepared:
    """Check on two short rows that the loss is that of the model's full logits: families differ in head and body. All
    processes make the same passes, through `run`. What is to be trained: without packs where `auto` chose them, and
    this model does not keep their rows apart."""
    rows = two_rows(prepared.train.rows)
    device, pad = next(model.parameters()).device, pad_token_id(prepared.tokenizer)
    batch = {name: tensor.to(device) for name, tensor in collate(rows, pad).items()}
    name, dtype = prepared.base.name, prepared.recipe.model.dtype
    near = EXACT if dtype == "float32" else HALF
    with fused_lora(model), autocast(device, dtype):
        with torch.no_grad():
            loss, count = run(supervised_loss, model, **batch)
            expected = run(full_logits_loss, model, **batch)
            if not loss.isfinite():
                remedy = " Or float16 does not hold its numbers: try model.dtype: float32." * (dtype == "float16")
                raise UserError(
                    f"model.base: {name}: the loss of two rows is {loss:g} before the first step. Its weights are "
                    f"damaged: fetch the model again.{remedy}"
                )
            if prepared.recipe.data.packing == "on":
                packed = collate_packed([rows], pad, ATTENTIONS[prepared.recipe.model.attention].flat)
                on_device = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in packed.items()}
                in_a_pack, _ = run(supervised_loss, model, attention_mask=None, **on_device)
                if not losses_agree(in_a_pack, loss, count, near):
                    prepared = _without_packing(prepared)
        if unreached := _unreached(model, run, batch):
            raise UserError(
                f"adapter.targets: the loss does not reach {len(unreached)} of the chosen modules, the first is "
                f"{unreached[0]}: the model computes without calling them. Leave them out with adapter.exclude."
            )
        if not run(is_causal, model, batch["input_ids"][:1], near):
            raise UserError(
                f"model.base: {name} lets earlier tokens see later ones: it is not a causal language model, and its "
                "loss would see the answers."
            )
    if not losses_agree(loss, expected, count, near):
        raise LorakitError(
            f"{name}: the loss at supervised positions is not what this architecture's own logits give. lorakit does "
            "not train it wrongly: please report the model."
        )
    return prepared


def _without_packing(prepared: Prepared) -> Prepared:
    """The run without packs; a UserError where the recipe asks for them."""
    reason = "two rows have another loss in one pack than alone"
    chosen = [choice for choice in prepared.choices if choice.path == "data.packing"]
    if not chosen:
        name = prepared.base.name
        raise UserError(f"data.packing: {name} does not keep packed rows apart: {reason}. Write packing: off.")
    choices = tuple(Choice(one.path, "off", reason) if one in chosen else one for one in prepared.choices)
    return replace(prepared, recipe=with_values(prepared.recipe, {"data.packing": "off"}), choices=choices)


def _unreached(model: Any, run: Pass, batch: dict[str, Any]) -> list[str]:
    """The modules whose adapter gets no gradient at all; none for a model without an adapter."""
    if not hasattr(model, "peft_config"):
        return []
    run(supervised_loss, model, **batch)[0].backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unreached = [name for name, parameter in trained.items() if parameter.grad is None]
    if not any(parameter.grad is not None and parameter.grad.any() for parameter in trained.values()):
        unreached = list(trained)
    model.zero_grad(set_to_none=True)
    return list(dict.fromkeys(name.removeprefix("base_model.model.").partition(".lora_")[0] for name in unreached))
