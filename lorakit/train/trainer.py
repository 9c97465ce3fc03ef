"""The one subclass of TRL's SFTTrainer: our batches, our passes, our checkpoints; the loop is the library's."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState
from trl import SFTTrainer

from lorakit.atomic_io import atomic_dir, write_atomic
from lorakit.data.dataset import Examples
from lorakit.errors import Interrupted, LorakitError
from lorakit.model.adapters.plain_lora import full_config, save_adapter, save_config
from lorakit.model.peft_adapter import TRAINED_DIR, TRAINED_WEIGHTS, trained_weights
from lorakit.plan.schedule import rate_share
from lorakit.progress import Progress
from lorakit.run_dir import Run
from lorakit.train.batch_sampler import StepBatchSampler, count_trained_tokens
from lorakit.train.micro_batching import MicroBatchRunner
from lorakit.train.optimizer import with_faster_b
from lorakit.train.setup import RANK_SCHEDULER


class SupervisedTrainer(SFTTrainer):
    """Trains on examples that are rendered and masked already. Its batch is a whole optimizer step."""

    def __init__(
        self,
        *,
        passes: MicroBatchRunner,
        examples: Examples,
        run: Run,
        progress: Progress,
        stopping: Callable[[], bool],
        ends_early: Callable[[TrainerState], bool],
        **options: Any,
    ) -> None:
        self.ends_early = ends_early
        self.passes, self.plan, self.rank_scheduler = passes, passes.plan, passes.rank_scheduler
        self.run, self.progress, self.stopping = run, progress, stopping
        self.mixture, self.lengths = examples.mixture, examples.lengths().tolist()
        self.control: TrainerControl
        self.lr_scheduler: Any
        weights = {name: p.detach().clone() for name, p in passes.model.named_parameters() if p.requires_grad}
        super().__init__(**options, model=passes.model, data_collator=_step)
        # SFTTrainer rounds the adapter of a quantized base to bfloat16; it is trained in the type it was made in.
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data = weights[name]
        passes.backward = self.accelerator.backward

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows of one step at a time: how they are split is decided when it is made."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=StepBatchSampler(self.lengths, self.plan, self.mixture),
            collate_fn=_step,
            generator=torch.Generator(),  # of its own: the global one belongs to dropout
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        self.step_tokens = sum(count_trained_tokens(batch["rows"]) for batch in batch_samples)
        return torch.tensor(self.step_tokens, device=device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["trained_tokens"] = self.step_tokens
        super().log(logs, start_time)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        return self.passes.step(inputs["rows"], self.step_tokens, self.state.global_step + 1)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss: the mean over all trained tokens of the held-out rows."""
        rows = self.eval_dataset
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        self.model.eval()
        total, tokens, begin = 0.0, 0, time.monotonic()
        with self.progress.bar("held-out loss", total=len(rows)) as bar:
            done = 0
            while done < len(order):
                if self.stopping():
                    # One that is made up after resuming has its checkpoint, and the random states are not loaded yet.
                    if not self.run.checkpoint(self.state.global_step).is_dir():
                        self._save_checkpoint(self.model, None)
                    raise Interrupted(
                        "stopped during an evaluation; the checkpoint is complete, --resume goes on from it"
                    )
                some = [rows[index] for index in order[done : done + self.passes.held_out_batch]]
                loss, count, many = self.passes.held_out_loss(some)
                total, tokens, done = total + loss, tokens + count, done + many
                bar.advance(many)
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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rate of every step as the recipe's schedule has it."""
        if self.lr_scheduler is None:
            plan = self.plan
            share = partial(rate_share, schedule=plan.schedule, warmup=plan.warmup, steps=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """When the run was stopped just before an evaluation, make it up first."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.owes_evaluation():
            step = self.state.global_step
            self.run.forget_evaluation(step)
            self._determine_best_metric(self.evaluate(), None)
            text = json.dumps(asdict(self.state), indent=2, sort_keys=True) + "\n"  # as its `save_to_json` writes it
            write_atomic(self.run.checkpoint(step) / "trainer_state.json", text)
        return prepared

    def owes_evaluation(self) -> bool:
        """Whether the held-out loss after the current step is due and was not measured, since the run was stopped."""
        step = self.state.global_step
        due = step and (step % self.plan.eval_steps == 0 or step == self.state.max_steps)
        return bool(due and self.eval_dataset is not None and not self._evaluated(step))

    def _run_epoch(self, **epoch: Any) -> None:
        """Nothing more, where the run was resumed after its last step: the loop looks only behind a further one."""
        if self.state.global_step >= self.state.max_steps or self.ends_early(self.state):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**epoch)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is always kept as a checkpoint. None is, before the adapter has the shape that was asked for."""
        if self.rank_scheduler and self.state.global_step < self.rank_scheduler.settled_at:
            return False
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self.control.should_save = True
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything that the next step depends on, under its final name only when it is complete."""
        step = self.state.global_step
        self.store_flos()
        with atomic_dir(self.run.checkpoint(step)) as draft:
            (draft / TRAINED_DIR).mkdir()
            save_file(
                {name: p.contiguous() for name, p in trained_weights(self.model).items()}, draft / TRAINED_WEIGHTS
            )
            if hasattr(self.model, "peft_config"):
                save_config(full_config(self.model), draft / TRAINED_DIR)
                save_adapter(self.model, draft)  # for whoever wants to try the adapter as it was here
            if self.rank_scheduler:
                save_file(self.rank_scheduler.state(), draft / RANK_SCHEDULER)
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


def _step(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows}
