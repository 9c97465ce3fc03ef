"""The one subclass of TRL's SFTTrainer: our batches, our loss, our checkpoints; the loop is the library's."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerControl
from trl import SFTTrainer

from lorakit.data.batches import collate, draws, epoch_batches, split_batch
from lorakit.data.encoded import IGNORED
from lorakit.data.packing import collate_packed, first_fit_decreasing
from lorakit.data.store import Examples
from lorakit.errors import Interrupted, LorakitError
from lorakit.folders import whole_folder
from lorakit.model.adapters.driver import Driver
from lorakit.model.adapters.plain import config_of, save_adapter
from lorakit.model.attach import STATE, WEIGHTS, trained_weights
from lorakit.model.loss import supervised_loss
from lorakit.progress import Progress
from lorakit.runs import Run
from lorakit.train.begin import DRIVER
from lorakit.train.optimizer import with_faster_b


@dataclass(frozen=True)
class Plan:
    """What the trainer needs to know of a run, in steps and rows."""

    batch_size: int
    micro_batch: int
    seed: int
    eval_steps: int
    keep: int
    pad_token_id: int
    packing: bool = False
    flat: bool = False
    """Packs go end to end in one row, as variable-length attention takes them."""
    lora_plus: float | None = None


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one epoch, those of one step behind each other; of rows to be packed, a whole step."""

    def __init__(self, lengths: Sequence[int], plan: Plan, weights: np.ndarray | None = None) -> None:
        self.lengths, self.plan, self.weights, self.epoch = lengths, plan, weights, 0

    @property
    def batch_sampler(self) -> "StepBatches":
        """Trainer hands the epoch to `dataloader.batch_sampler.batch_sampler`, where accelerate's wrapper would be."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan
        for rows in epoch_batches(self.lengths, plan.batch_size, plan.seed, self.epoch, self.weights):
            yield from [rows] if plan.packing else split_batch(rows, plan.micro_batch)

    def __len__(self) -> int:
        whole, rest = divmod(draws(len(self.lengths), self.weights), self.plan.batch_size)
        if self.plan.packing:
            return whole + bool(rest)
        return whole * -(-self.plan.batch_size // self.plan.micro_batch) + -(-rest // self.plan.micro_batch)


class SupervisedTrainer(SFTTrainer):
    """Trains on examples that are rendered and masked already.

    The loss of a step is the mean over its trained tokens, whatever micro-batches it is split into.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the trained tokens of the whole step

    def __init__(
        self,
        *,
        plan: Plan,
        examples: Examples,
        run: Run,
        progress: Progress,
        stopping: Callable[[], bool],
        driver: Driver | None,
        **options: Any,
    ) -> None:
        self.plan, self.run, self.progress, self.stopping = plan, run, progress, stopping
        self.weights, self.lengths = examples.weights, examples.lengths().tolist()
        self.longest = max(self.lengths)
        self.control: TrainerControl
        model = options["model"]
        self.driver = driver
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(**options, data_collator=self._collate)
        # SFTTrainer rounds the adapter of a quantized base to bfloat16; it is trained in the type it was made in.
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data = weights[name]

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(rows, self.plan.pad_token_id), "where": [row["where"] for row in rows]}

    def _collate_step(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The packs of a whole step, as many in one micro-batch as rows would be, each as long as the longest row."""
        packs = first_fit_decreasing([len(row["input_ids"]) for row in rows], self.longest)
        micro_batches = []
        for some in split_batch(packs, self.plan.micro_batch):
            packed = [[rows[index] for index in pack] for pack in some]
            tensors = collate_packed(packed, self.plan.pad_token_id, self.plan.flat)
            where = [row["where"] for pack in packed for row in pack]
            micro_batches.append({**tensors, "where": where})
        return {"packed": micro_batches}

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,
            batch_sampler=StepBatches(self.lengths, self.plan, self.weights),
            collate_fn=self._collate_step if self.plan.packing else self._collate,
            generator=torch.Generator(),  # of its own: the global one belongs to dropout
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        batches = [one for batch in batch_samples for one in batch.get("packed", [batch])]
        self.step_tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        return torch.tensor(self.step_tokens, device=device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["trained_tokens"] = self.step_tokens
        super().log(logs, start_time)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        step = super().training_step
        return torch.stack([step(model, one, num_items_in_batch) for one in inputs.get("packed", [inputs])]).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        total, count = self._summed_loss(inputs)
        if not torch.isfinite(total):
            raise LorakitError(self._not_finite(inputs, total))
        items = num_items_in_batch.clamp(min=1)
        if self.driver is None:
            return total / items
        penalty = self.driver.penalty() * (count / items)  # once a step, whatever micro-batches it is split into
        return total / items + penalty - penalty.detach()  # the log shows the rows' loss alone

    def _summed_loss(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        with self.accelerator.autocast():
            return supervised_loss(
                self.model,
                inputs["input_ids"],
                inputs.get("attention_mask"),
                inputs["labels"],
                inputs.get("position_ids"),
            )

    def _not_finite(self, inputs: dict[str, Any], total: torch.Tensor) -> str:
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
            f"step {self.state.global_step + 1}: the loss is {total.item()}; rows: {rows}. The weights may have left "
            "the range of numbers: lower train.learning_rate, and look at these rows."
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss: the mean over all trained tokens of the held-out rows."""
        rows = self.eval_dataset
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        self.model.eval()
        total, tokens, begin = 0.0, 0, time.monotonic()
        with torch.no_grad(), self.progress.bar("held-out loss", total=len(rows)) as bar:
            for batch in split_batch(order, self.plan.micro_batch):
                if self.stopping():
                    # One that is made up after resuming has its checkpoint, and the random states are not loaded yet.
                    if not self.run.checkpoint(self.state.global_step).is_dir():
                        self._save_checkpoint(self.model, None)
                    raise Interrupted(
                        "stopped during an evaluation; the checkpoint is complete, --resume goes on from it"
                    )
                loss, count = self._summed_loss(self._prepare_inputs(self._collate([rows[index] for index in batch])))
                total, tokens = total + float(loss), tokens + count
                bar.advance(len(batch))
        self.model.train()
        if not math.isfinite(total):
            raise LorakitError(
                f"step {self.state.global_step}: the held-out loss is {total}. The weights have left the range "
                "of numbers: lower train.learning_rate."
            )
        metrics = {"eval_loss": total / tokens, "eval_seconds": time.monotonic() - begin}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW over the trained weights; with LoRA+ the B matrices learn faster by its ratio."""
        optimizer = super().create_optimizer(model)
        if self.plan.lora_plus is not None:
            optimizer.param_groups[:] = with_faster_b(optimizer.param_groups, self.model, self.plan.lora_plus)
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """When the run was stopped just before an evaluation, make it up first."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        step = self.state.global_step
        due = step and (step % self.plan.eval_steps == 0 or step == max_steps)
        if due and self.eval_dataset is not None and not self._evaluated(step):
            self._determine_best_metric(self.evaluate(), None)
        return prepared

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is always kept as a checkpoint. None is, before the adapter has the shape that was asked for."""
        if self.driver and self.state.global_step < self.driver.settled_at:
            return False
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self.control.should_save = True
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything that the next step depends on, under its final name only when it is complete."""
        step = self.state.global_step
        self.store_flos()
        with whole_folder(self.run.checkpoint(step)) as draft:
            (draft / STATE).mkdir()
            save_file({name: p.contiguous() for name, p in trained_weights(self.model).items()}, draft / WEIGHTS)
            if hasattr(self.model, "peft_config"):
                config_of(self.model).save_pretrained(str(draft / STATE))
                save_adapter(self.model, draft)  # for whoever wants to try the adapter as it was here
            if self.driver:
                save_file(self.driver.state(), draft / DRIVER)
            self._save_optimizer_and_scheduler(str(draft))
            self._save_scaler(str(draft))
            self._save_rng_state(str(draft))
            self.state.save_to_json(str(draft / "trainer_state.json"))
        self.run.prune_checkpoints(self.plan.keep, self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the weights of the checkpoint are in the model before the trainer is made."""

    def _evaluated(self, step: int) -> bool:
        """Whether the held-out loss after `step` is in the log."""
        return any(entry["step"] == step and "eval_loss" in entry for entry in self.state.log_history)
