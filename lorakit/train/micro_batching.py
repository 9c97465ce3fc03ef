"""The forward and backward passes of a step: micro-batches that fit into memory, and smaller ones where they do not."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from lorakit.data.batches import collate, collate_packed, first_fit_decreasing, split_batch
from lorakit.data.rows import IGNORED
from lorakit.distributed.processes import (
    any_of,
    gather,
    is_first,
    rank,
    refuse,
    sum_in_place,
    time_sum,
    together,
    world_size,
)
from lorakit.distributed.sharing import deal
from lorakit.errors import LorakitError
from lorakit.hardware.accelerator import random_states, set_random_states
from lorakit.hardware.memory import OutOfMemory, free_memory, within_memory
from lorakit.model.fused_lora import fused_lora, release_int8_inputs
from lorakit.model.load import DTYPES
from lorakit.model.loss import supervised_loss
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.train.gradient_checkpointing import (
    set_gradient_checkpointing,
    supports_gradient_checkpointing,
    uses_gradient_checkpointing,
)
from lorakit.train.setup import TrainingState
from lorakit.train.sharding import plain_pass

Pack = list[dict[str, Any]]  # what a micro-batch counts: the rows of one pack, or one row where the run does not pack


def without_labels(row: dict[str, Any]) -> dict[str, Any]:
    """The row with nothing to train: its loss and its gradients are zero."""
    return row | {"labels": [IGNORED] * len(row["labels"])}


@dataclass(frozen=True)
class Shortage:
    """Memory ran out on one process, on micro-batches of at most `tried` packs. `largest`: the rows and the tokens of
    its longest pack."""

    tried: int
    largest: tuple[int, int]
    message: str


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a step are laid out in tensors."""

    pad_token_id: int
    pack_length: int | None = None  # the most tokens of a pack; None where rows are not packed
    flat: bool = False  # packs go end to end in one row, as variable-length attention takes them

    def pack(self, rows: Sequence[dict[str, Any]]) -> list[Pack]:
        """The rows of a step one by one, or in packs."""
        if self.pack_length is None:
            return [[row] for row in rows]
        packs = first_fit_decreasing([len(row["input_ids"]) for row in rows], self.pack_length)
        return [[rows[index] for index in pack] for pack in packs]

    def collate(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """One micro-batch as tensors (rows or packs, tokens), and the places of its rows as `where`."""
        rows = [row for pack in packs for row in pack]
        if self.pack_length is None:
            tensors = collate(rows, self.pad_token_id)
        else:
            tensors = collate_packed(packs, self.pad_token_id, self.flat)
        return {**tensors, "where": [row["where"] for row in rows]}


def count_trained_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """The tokens over which the loss of some rows is the mean; a row's first token has nothing before it."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


class MicroBatchRunner:
    """Computes the loss and the gradients of each step, in micro-batches that fit into memory.

    The loss of a step is the mean over its trained tokens. Where memory runs out, the step is done again from its
    beginning in micro-batches half as large, and so are all after it; `on_shrink` gets the facts by name. Of several
    processes each computes a share of the step's rows, and all go on with the same micro-batches; `reduced` are the
    bytes of gradients that a step adds up, in about `reduction_seconds`.
    """

    def __init__(
        self,
        state: TrainingState,
        prepared: Prepared,
        progress: Progress,
        on_shrink: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.prepared = prepared
        recipe = self.recipe = prepared.recipe
        self.model, self.rank_scheduler = state.model, state.rank_scheduler
        self.sharding, self.run = state.sharding, state.run
        self.progress, self.on_shrink = progress, on_shrink
        self.reduced, self.reduction_seconds = 0, 0.0
        set_gradient_checkpointing(self.model, bool(recipe.train.gradient_checkpointing))
        self.device = next(self.model.parameters()).device
        self.micro_batch = self.held_out_batch = int(recipe.train.micro_batch)
        self.layout = BatchLayout(
            pad_token_id(prepared.tokenizer),
            pack_length=int(prepared.train.lengths().max()) if recipe.data.packing == "on" else None,
            flat=recipe.model.attention == "flash_attention_2",
        )
        self.backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
        """The trainer replaces it by accelerate's, which scales the loss in float16."""

    @property
    def recomputes(self) -> bool:
        """Whether gradient checkpointing is on: as the recipe has it, or since not even one row fitted."""
        return uses_gradient_checkpointing(self.model)

    def run_step(self, rows: Sequence[dict[str, Any]], tokens: int, step: int) -> torch.Tensor:
        """The mean loss of a step over its trained `tokens`. The weights, which have no gradients yet, get them.
        LorakitError where the loss is not a number, or not even one row fits into memory."""
        self.model.train()
        # Without a row of its own a process computes one that trains nothing: DoRA forgets its norms in the backward.
        packs = self.layout.pack(deal(rows, rank(), world_size()) or [without_labels(rows[0])])
        if rank():  # each process has its own dropout; the first one's stream is that of the run, in its checkpoints
            torch.manual_seed(_stream_seed(self.recipe.train.seed, step, rank()))
        states = random_states(self.device)  # from which dropout draws
        while True:
            loss = self.sharding.attempt(partial(within_memory, partial(self._run_packs, packs, tokens, step)))
            if not (shortages := self.shortages(packs, loss)):
                assert not isinstance(loss, OutOfMemory)
                return self._reduce(loss)
            self.drop_gradients()
            set_random_states(self.device, states)
            self.shrink(f"at step {step}", step, shortages)

    def _run_packs(self, packs: list[Pack], tokens: int, step: int) -> torch.Tensor:
        some = split_batch(packs, self.micro_batch)
        if self.sharding.is_collective:
            missing = max(gather(len(some))) - len(some)
            some += [[[without_labels(row) for row in packs[-1]]]] * missing
        return sum((self.run_micro_batch(few, tokens, step) for few in some), torch.zeros((), device=self.device))

    def _reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of all processes, and return the loss of the whole step."""
        if world_size() == 1:
            return loss
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        trained = [parameter for parameter in trained if not self.sharding.is_shared_out(parameter)]
        if self.sharding.share_optimizer or not trained:  # the sums are in each process's parts already
            sum_in_place([loss])
            return loss
        if any_of(any(parameter.grad is None for parameter in trained)) == (True,):  # such as an expert's
            reached = any_of(*(parameter.grad is not None for parameter in trained))
            trained = [parameter for parameter, somewhere in zip(trained, reached, strict=True) if somewhere]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not self.reduced:
            self.reduction_seconds = time_sum(sum(parameter.numel() for parameter in trained), loss)
        self.reduced = sum_in_place([*(parameter.grad for parameter in trained), loss])
        return loss

    def run_micro_batch(self, packs: Sequence[Pack], tokens: int, step: int) -> torch.Tensor:
        """Forward and backward of one micro-batch: its part of the loss of a step with so many trained `tokens`."""
        inputs = self._on_device(self.layout.collate(packs))
        total, count = self._summed_loss(inputs)
        agree = together if self.sharding.is_collective else plain_pass  # the others would wait in the backward pass
        agree(partial(self._check_finite, inputs, total, step))
        items = torch.tensor(tokens, device=self.device).clamp(min=1)
        loss = total / items
        if self.rank_scheduler is not None:
            penalty = self.rank_scheduler.penalty() * (count / items)  # which counts once a step
            loss = loss + penalty - penalty.detach()  # the log shows the rows' loss alone
        self.backward(loss)
        return loss.detach()

    def drop_gradients(self) -> None:
        """Drop the gradients, and give back the memory of passes that failed."""
        self.model.zero_grad(set_to_none=True)
        free_memory()

    def shortages(self, packs: Sequence[Pack], result: Any) -> dict[int, Shortage]:
        """The processes on which memory ran out, if `result` is what became of these packs here."""
        own = None
        if isinstance(result, OutOfMemory):
            largest = len(packs[0]), sum(len(row["input_ids"]) for row in packs[0])
            own = Shortage(min(self.micro_batch, len(packs)), largest, result.message)
        if self.sharding.is_collective:  # the others wait inside their pass
            return {rank(): own} if own else {}
        if any_of(own is not None) == (False,):
            return {}
        return {rank: shortage for rank, shortage in enumerate(gather(own)) if shortage}

    def shrink(self, when: str, step: int, shortages: dict[int, Shortage]) -> None:
        """Choose what all processes go on with after memory ran out on some, and report it; LorakitError where nothing
        smaller is left. Where the others wait inside a pass the run ends, and goes on with it when it is resumed."""
        process, shortage = min(shortages.items(), key=lambda item: item[1].tried)
        tried = shortage.tried
        when += f" on rank {process}" if world_size() > 1 else ""
        if tried > 1:
            self.micro_batch = -(-tried // 2)
            remedy = f"micro-batches of {self.micro_batch} from here on"
        elif not self.recomputes and supports_gradient_checkpointing(self.model):
            self.micro_batch = 1
            set_gradient_checkpointing(self.model, True)
            remedy = "gradient checkpointing from here on"
        else:
            error = LorakitError(self._too_large(when, *shortage.largest, shortage.message))
            if self.sharding.is_collective:
                raise error
            refuse(error)
        self.held_out_batch = min(self.held_out_batch, self.micro_batch)  # as a resumed run has it
        change = {"step": step, "micro_batch": tried, "now": self.micro_batch}
        change |= {"gradient_checkpointing": self.recomputes}
        if self.sharding.is_collective:
            self.on_shrink(change)
            raise LorakitError(
                f"out of memory {when} with micro_batch {tried}. With train.sharding: {self.recipe.train.sharding} the "
                "other processes wait inside the same pass, and it cannot be done again. --resume goes on from the "
                f"last checkpoint, with {remedy}."
            )
        but = " except for dropout masks" if self.recipe.adapter.dropout else ""
        self.progress.warn(f"out of memory {when} with micro_batch {tried}: {remedy}. Results are unchanged{but}.")
        if is_first():
            self.on_shrink(change)

    def held_out_loss(self, rows: Sequence[dict[str, Any]], step: int) -> tuple[float, int, int]:
        """The summed loss and the trained tokens of the first of `rows`, as many as fit into memory, and how many.
        `step`: after which it is measured."""
        while rows:
            some = rows[: self.held_out_batch]
            result = within_memory(partial(self._held_out_loss, some))
            if not isinstance(result, OutOfMemory):
                return (*result, len(some))
            free_memory()
            if self.sharding.is_collective:
                self.shrink("in the held-out evaluation", step, self.shortages([[row] for row in some], result))
            if len(some) == 1:
                tokens = len(some[0]["input_ids"])
                raise LorakitError(self._too_large("in the held-out evaluation", 1, tokens, result.message))
            self.held_out_batch = -(-len(some) // 2)
            self.progress.warn(
                f"out of memory in the held-out evaluation: {self.held_out_batch} rows at once from now on"
            )
        return 0.0, 0, 0

    def _held_out_loss(self, rows: Sequence[dict[str, Any]]) -> tuple[float, int]:
        with torch.no_grad():
            loss, count = self._summed_loss(self._on_device(collate(rows, self.layout.pad_token_id)))
            return float(loss), count

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def _summed_loss(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        once = self.sharding.is_collective
        with autocast(self.device, self.recipe.model.dtype, keeps_casts=not once):
            return self.run(supervised_loss, self.model, *(inputs.get(name) for name in names), once)

    def _check_finite(self, inputs: dict[str, Any], total: torch.Tensor, step: int) -> None:
        if not torch.isfinite(total):
            raise LorakitError(self._not_finite(inputs, total, step))

    def _not_finite(self, inputs: dict[str, Any], total: torch.Tensor, step: int) -> str:
        """Name the step and the rows at fault: those whose own loss is not a number, else all of the micro-batch."""
        at_fault = []
        # Rows are not tried one by one where they are packed, or where other processes would have to make these passes.
        if "attention_mask" in inputs and not self.sharding.is_collective:
            with torch.no_grad():
                for index, where in enumerate(inputs["where"]):
                    row = {name: inputs[name][index : index + 1] for name in ("input_ids", "attention_mask", "labels")}
                    if not torch.isfinite(self._summed_loss(row)[0]):
                        at_fault.append(where)
        rows = ", ".join((at_fault or inputs["where"])[:8])
        remedy = "Lower train.learning_rate, and look at these rows."
        return f"step {step}: the loss is {total.item()}; rows: {rows}. {remedy}"

    def _too_large(self, when: str, rows: int, tokens: int, message: str) -> str:
        quantization = "model.quantization: nf4, " if self.recipe.model.quantization == "none" else ""
        return (
            f"out of memory {when}: one {'pack' if rows > 1 else 'row'} of {tokens:,} tokens does not fit "
            f"({message}). Write a smaller data.max_length, {quantization}or fewer adapter.targets; lorakit "
            "plan tells what fits."
        )


def _stream_seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


def autocast(device: torch.device, dtype: str, keeps_casts: bool = True) -> torch.autocast:
    """Products in half precision, where the recipe computes in it. `keeps_casts`: whether a weight is cast once and its
    cast held until the end, though the weight itself be given back."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32", cache_enabled=keeps_casts)


@contextmanager
def compute_optimizations(model: Any, dtype: str) -> Iterator[None]:
    """Within this, the model computes as it is trained. Nothing of it is left changed."""
    # Under autocast the product is computed in half precision anyway: PEFT's copies to float32 would cost memory.
    is_peft = isinstance(model, PeftModel)
    no_casting = disable_input_dtype_casting(model, active=dtype != "float32") if is_peft else nullcontext()
    with no_casting, release_int8_inputs(model), fused_lora(model):
        yield
