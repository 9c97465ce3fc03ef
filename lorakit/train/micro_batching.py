"""The forward and backward passes of a step: micro-batches that fit into memory, and smaller ones where they do not."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel

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
from lorakit.model.block_code import PLAIN, BlockCode, use_block_code
from lorakit.model.load import DTYPES
from lorakit.model.loss import supervised_loss
from lorakit.model.token_rows import without_input_casts
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.attention import ATTENTIONS
from lorakit.train.batch_layout import BatchLayout, MicroBatch, Pack, length_of, without_labels
from lorakit.train.gradient_checkpointing import (
    set_gradient_checkpointing,
    supports_gradient_checkpointing,
    uses_gradient_checkpointing,
)
from lorakit.train.setup import TrainingState


@dataclass(frozen=True)
class Shortage:
    """Memory ran out on one process, on micro-batches with the room of at most `tried` of the longest rows. `largest`:
    the rows and the tokens of the longest pack."""

    tried: int
    largest: tuple[int, int]
    message: str


@dataclass(frozen=True)
class StepLoss:
    """The mean loss of a step, on its device, which may still be computing it. `micro_batches`: those of this process,
    with the part that each has of it."""

    step: int
    total: torch.Tensor
    micro_batches: list[tuple[MicroBatch, torch.Tensor]]


@dataclass(frozen=True)
class StepBatches:
    """The rows of a step as micro-batches on the device, cut for micro-batches of so many rows."""

    rows: Sequence[dict[str, Any]]
    micro_batch: int
    batches: list[MicroBatch]


class MicroBatchRunner:
    """Computes the loss and the gradients of each step, in micro-batches that fit into memory.

    A micro-batch has the room of `micro_batch` of the run's longest rows, which more fill where they are shorter. The
    passes of a step never wait for the device; `read_loss` does, once. The loss of a step is the mean over its trained
    tokens. Where memory runs out, the step is done again from its
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
            longest=int(prepared.train.lengths().max()),
            packs=recipe.data.packing == "on",
            flat=recipe.data.packing == "on" and ATTENTIONS[recipe.model.attention].flat,
        )
        self.works_ahead = self.device.type == "cuda"  # a processor has nothing to do while it computes
        self.ahead: StepBatches | None = None
        self.backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
        """The trainer replaces it by accelerate's, which scales the loss in float16."""

    @property
    def recomputes(self) -> bool:
        """Whether gradient checkpointing is on: as the recipe has it, or since not even one row fitted."""
        return uses_gradient_checkpointing(self.model)

    def run_step(self, rows: Sequence[dict[str, Any]], tokens: int, step: int) -> StepLoss:
        """The passes of a step over its trained `tokens`. The weights, which have no gradients yet, get them; whether
        the loss is a number, `read_loss` tells. LorakitError where not even one row fits into memory."""
        self.model.train()
        if rank():  # each process has its own dropout; the first one's stream is that of the run, in its checkpoints
            torch.manual_seed(_stream_seed(self.recipe.train.seed, step, rank()))
        states = random_states(self.device)  # from which dropout draws
        while True:
            parts = self.sharding.attempt(partial(within_memory, partial(self._run_passes, rows, tokens, step)))
            if not (shortages := self.shortages(self._packs_of(rows), parts)):
                assert not isinstance(parts, OutOfMemory)
                total = sum((part for _, part in parts), torch.zeros((), device=self.device))
                return StepLoss(step, self._reduce(total), parts)
            self.drop_gradients()
            set_random_states(self.device, states)
            self.shrink(f"at step {step}", step, shortages)

    def prepare_ahead(self, rows: Sequence[dict[str, Any]]) -> None:
        """Bring the rows of the next step to the device, while it computes."""
        self.ahead = self._lay_out(rows)

    def read_loss(self, loss: StepLoss, norm: torch.Tensor | None = None) -> tuple[float, float]:
        """The mean loss of a step, and the norm of its gradient where it is given: the one time in a step that it waits
        for the device. LorakitError where the loss is not a number, with the step and the rows at fault."""
        parts = [part for _, part in loss.micro_batches]
        numbers = [loss.total, *parts] if norm is None else [loss.total, *parts, norm]
        total, *rest = torch.stack([number.detach().float() for number in numbers]).tolist()
        if not math.isfinite(total):  # on all processes, which have added it up
            together(partial(self._check_finite, loss, rest[: len(parts)]))
            refuse(LorakitError(f"step {loss.step}: the loss is {total}. Lower train.learning_rate."))
        return total, rest[-1] if norm is not None else math.nan

    def _packs_of(self, rows: Sequence[dict[str, Any]]) -> list[Pack]:
        """What this process computes of a step. Without a row of its own it computes one that trains nothing: DoRA
        forgets its norms in the backward."""
        return self.layout.pack(deal(rows, rank(), world_size()) or [without_labels(rows[0])])

    def _lay_out(self, rows: Sequence[dict[str, Any]]) -> StepBatches:
        packs = self._packs_of(rows)
        parts = self.layout.cut(packs, self.micro_batch)
        if self.sharding.is_collective:
            missing = max(gather(len(parts))) - len(parts)
            parts += [[[without_labels(row) for row in packs[-1]]]] * missing
        return StepBatches(rows, self.micro_batch, [self.layout.collate(part).to(self.device) for part in parts])

    def _run_passes(
        self, rows: Sequence[dict[str, Any]], tokens: int, step: int
    ) -> list[tuple[MicroBatch, torch.Tensor]]:
        """Each micro-batch of a step, with its part of the loss."""
        laid_out, self.ahead = self.ahead, None
        if laid_out is None or laid_out.rows is not rows or laid_out.micro_batch != self.micro_batch:
            laid_out = self._lay_out(rows)
        return [(batch, self.run_micro_batch(batch, tokens, step)) for batch in laid_out.batches]

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

    def run_micro_batch(self, batch: MicroBatch, tokens: int, step: int) -> torch.Tensor:
        """Forward and backward of one micro-batch: its part of the loss of a step with so many trained `tokens`."""
        total, count = self._summed_loss(batch)
        items = max(tokens, 1)
        part = loss = total / items
        if self.rank_scheduler is not None:  # its penalty counts once a step, and is not logged
            loss = loss + self.rank_scheduler.penalty() * (count / items)
        self.backward(loss)
        return part.detach()

    def drop_gradients(self) -> None:
        """Drop the gradients, and give back the memory of passes that failed."""
        self.model.zero_grad(set_to_none=True)
        free_memory()

    def shortages(self, packs: Sequence[Pack], result: Any) -> dict[int, Shortage]:
        """The processes on which memory ran out, if `result` is what became of these packs here."""
        own = None
        if isinstance(result, OutOfMemory):
            tried = max(map(self.layout.room_of, self.layout.cut(packs, self.micro_batch)))
            own = Shortage(min(tried, self.micro_batch), (len(packs[0]), length_of(packs[0])), result.message)
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
        if self.micro_batch > 1:
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
            unpacked = replace(self.layout, packs=False)
            loss, count = self._summed_loss(unpacked.collate([[row] for row in rows]).to(self.device))
            return float(loss), count

    def _summed_loss(self, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        once = self.sharding.is_collective
        with autocast(self.device, self.recipe.model.dtype, keeps_casts=not once):
            given = {"attention_mask": None, **batch.tensors, "once": once, "trained": batch.trained}
            return self.run(supervised_loss, self.model, **given)

    def _check_finite(self, loss: StepLoss, parts: list[float]) -> None:
        for (batch, _), part in zip(loss.micro_batches, parts, strict=True):
            if not math.isfinite(part):
                rows = ", ".join(self._rows_at_fault(batch)[:8])
                remedy = "Lower train.learning_rate, and look at these rows."
                raise LorakitError(f"step {loss.step}: the loss is {part}; rows: {rows}. {remedy}")

    def _rows_at_fault(self, batch: MicroBatch) -> list[str]:
        """The rows whose own loss is not a number, else all of the micro-batch. They are not tried one by one where
        they are packed, or where other processes would have to make these passes."""
        at_fault = []
        if not self.layout.packs and not self.sharding.is_collective:
            with torch.no_grad():
                for pack in batch.packs:
                    total, _ = self._summed_loss(self.layout.collate([pack]).to(self.device))
                    at_fault += [row["where"] for row in pack if not torch.isfinite(total)]
        return at_fault or [row["where"] for row in batch.rows]

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
def compute_optimizations(model: Any, dtype: str, code: BlockCode = PLAIN) -> Iterator[None]:
    """Within this, the model computes as it is trained, its blocks by `code`. Nothing of it is left changed."""
    # Under autocast the product is computed in half precision anyway: PEFT's copies to float32 would cost memory.
    is_peft = isinstance(model, PeftModel)
    no_casting = without_input_casts(model, active=dtype != "float32") if is_peft else nullcontext()
    with no_casting, use_block_code(model, code):
        yield
