"""The forward and backward passes of a step: micro-batches that fit into memory, and smaller ones where they do not."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from lorakit.data.batches import collate, split_batch
from lorakit.errors import LorakitError
from lorakit.hardware.memory import OutOfMemory, free_memory, within_memory
from lorakit.model.fused_lora import fused_lora
from lorakit.model.load import DTYPES
from lorakit.model.loss import supervised_loss
from lorakit.model.quantized_model import release_int8_inputs
from lorakit.progress import Progress
from lorakit.recipe.schema import Recipe
from lorakit.train.batch_sampler import Pack, Plan, collate_packs, pack_rows
from lorakit.train.gradient_checkpointing import (
    set_gradient_checkpointing,
    supports_gradient_checkpointing,
    uses_gradient_checkpointing,
)
from lorakit.train.setup import TrainingState


@dataclass(frozen=True)
class Shrunk:
    """Memory ran out in a step: the micro-batch that was too large, and what the run goes on with."""

    step: int
    micro_batch: int
    now: int
    gradient_checkpointing: bool


class MicroBatchRunner:
    """Computes the loss of each step and leaves its gradients, whatever micro-batches it takes.

    The loss of a step is the mean over its trained tokens. Where memory runs out, the step is done again from its
    beginning in micro-batches half as large, and so are all after it; `shrunk` is told.
    """

    def __init__(
        self,
        begun: TrainingState,
        recipe: Recipe,
        plan: Plan,
        progress: Progress,
        shrunk: Callable[[Shrunk], None] = lambda _: None,
    ) -> None:
        self.model, self.rank_scheduler = begun.model, begun.rank_scheduler
        self.recipe, self.plan, self.progress, self.shrunk = recipe, plan, progress, shrunk
        self.device = next(self.model.parameters()).device
        self.micro_batch, self.held_out_batch = plan.micro_batch, plan.micro_batch
        self.backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
        """The trainer puts its own here, which scales the loss in float16."""

    def step(self, rows: Sequence[dict[str, Any]], tokens: int, number: int) -> torch.Tensor:
        """The mean loss of step `number` over its trained `tokens`. The weights, which have no gradients yet, get them.

        Raises:
            LorakitError: the loss is not a number, or not even one row fits into memory.
        """
        self.model.train()
        units, begin = pack_rows(rows, self.plan), _random_states(self.device)
        while True:
            done = within_memory(partial(self._through, units, tokens, number))
            if not isinstance(done, OutOfMemory):
                return done
            self.forget()
            _set_random_states(begin, self.device)
            self.shrink(f"at step {number}", number, units, done)

    def _through(self, units: list[Pack], tokens: int, number: int) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for some in split_batch(units, self.micro_batch):
            total += self.micro_batch_through(some, tokens, number)
        return total

    def micro_batch_through(self, units: Sequence[Pack], tokens: int, number: int) -> torch.Tensor:
        """Forward and backward of one micro-batch: its part of the loss of a step with so many trained `tokens`."""
        inputs = self._on_device(collate_packs(units, self.plan))
        total, count = self._summed_loss(inputs)
        if not torch.isfinite(total):
            raise LorakitError(self._not_finite(inputs, total, number))
        items = torch.tensor(tokens, device=self.device).clamp(min=1)
        loss = total / items
        if self.rank_scheduler is not None:
            penalty = self.rank_scheduler.penalty() * (
                count / items
            )  # once a step, whatever micro-batches it is split into
            loss = loss + penalty - penalty.detach()  # the log shows the rows' loss alone
        self.backward(loss)
        return loss.detach()

    def forget(self) -> None:
        """Drop the gradients, and give back the memory of passes that failed."""
        self.model.zero_grad(set_to_none=True)
        free_memory()

    def shrink(self, when: str, number: int, units: Sequence[Pack], failed: OutOfMemory) -> None:
        """Choose what to go on with after memory ran out on micro-batches of these units, and say so.

        Raises:
            LorakitError: there is nothing smaller.
        """
        tried = min(self.micro_batch, len(units))
        if tried > 1:
            self.micro_batch = -(-tried // 2)
            change = f"micro-batches of {self.micro_batch} from here on"
        elif not uses_gradient_checkpointing(self.model) and supports_gradient_checkpointing(self.model):
            self.micro_batch = 1
            set_gradient_checkpointing(self.model, True)
            change = "gradient checkpointing from here on"
        else:
            raise LorakitError(self._too_large(when, units[0], failed))
        self.held_out_batch = min(self.held_out_batch, self.micro_batch)  # as a resumed run has it
        but = " except for dropout masks" if self.recipe.adapter.dropout else ""
        self.progress.warn(f"out of memory {when} with micro_batch {tried}: {change}. Results are unchanged{but}.")
        self.shrunk(Shrunk(number, tried, self.micro_batch, uses_gradient_checkpointing(self.model)))

    def held_out_loss(self, rows: Sequence[dict[str, Any]]) -> tuple[float, int, int]:
        """The summed loss and the trained tokens of the first of `rows`, as many as fit into memory, and how many.

        Raises:
            LorakitError: not even one row fits.
        """
        while True:
            some = rows[: self.held_out_batch]
            found = within_memory(partial(self._held_out_loss, some))
            if not isinstance(found, OutOfMemory):
                return (*found, len(some))
            free_memory()
            if len(some) == 1:
                raise LorakitError(self._too_large("in the held-out evaluation", some, found))
            self.held_out_batch = -(-len(some) // 2)
            self.progress.warn(
                f"out of memory in the held-out evaluation: {self.held_out_batch} rows at once from here on"
            )

    def _held_out_loss(self, rows: Sequence[dict[str, Any]]) -> tuple[float, int]:
        with torch.no_grad():
            loss, count = self._summed_loss(self._on_device(collate(rows, self.plan.pad_token_id)))
            return float(loss), count

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def _summed_loss(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        with autocast(self.device, self.recipe.model.dtype):
            return supervised_loss(
                self.model,
                inputs["input_ids"],
                inputs.get("attention_mask"),
                inputs["labels"],
                inputs.get("position_ids"),
            )

    def _not_finite(self, inputs: dict[str, Any], total: torch.Tensor, number: int) -> str:
        """Name the step and the rows at fault: those whose own loss is not a number, else all of the micro-batch."""
        at_fault = []
        apart = "attention_mask" in inputs  # rows that are packed are not tried one by one
        with torch.no_grad():
            for index, where in enumerate(inputs["where"] if apart else []):
                row = {name: inputs[name][index : index + 1] for name in ("input_ids", "attention_mask", "labels")}
                if not torch.isfinite(self._summed_loss(row)[0]):
                    at_fault.append(where)
        rows = ", ".join((at_fault or inputs["where"])[:8])
        return (
            f"step {number}: the loss is {total.item()}; rows: {rows}. The weights may have left "
            "the range of numbers: lower train.learning_rate, and look at these rows."
        )

    def _too_large(self, when: str, unit: Sequence[dict[str, Any]], failed: OutOfMemory) -> str:
        tokens, recipe = sum(len(row["input_ids"]) for row in unit), self.recipe
        remedies = ["a smaller data.max_length"]
        if recipe.model.quantization == "none":
            remedies.append("model.quantization: nf4")
        remedies.append("fewer adapter.targets")
        return (
            f"out of memory {when}: one {'pack' if len(unit) > 1 else 'row'} of {tokens:,} tokens does not fit "
            f"({failed.message}). Write {', or '.join(remedies)}; lorakit plan tells what fits."
        )


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Products in half precision, where the recipe computes in it."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


@contextmanager
def compute_optimizations(model: Any, dtype: str) -> Iterator[None]:
    """Within this, the model computes as it is trained. Nothing of it is left changed."""
    with _without_copies(model, dtype != "float32"), release_int8_inputs(model), fused_lora(model):
        yield


def _without_copies(model: Any, halves: bool) -> AbstractContextManager[Any]:
    """Under autocast the product is computed in half precision anyway; PEFT's copies to float32 would cost memory."""
    return disable_input_dtype_casting(model, active=halves) if isinstance(model, PeftModel) else nullcontext()


def _random_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where the generators stand that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_states(states: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
