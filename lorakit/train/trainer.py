"""The one subclass of TRL's SFTTrainer: our batches, our passes, our checkpoints; the loop is the library's."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer

from lorakit.atomic_io import atomic_dir, write_atomic
from lorakit.distributed.processes import (
    any_of,
    from_first,
    gather,
    is_first,
    on_first,
    rank,
    refuse,
    world_size,
)
from lorakit.distributed.sharing import deal
from lorakit.errors import Interrupted, LorakitError
from lorakit.hardware.memory import run_peak
from lorakit.model.peft_adapter import trained_parameters
from lorakit.plan.schedule import rate_share, warmup_steps
from lorakit.progress import Bar
from lorakit.run_dir import Run
from lorakit.track.tracking import Tracking
from lorakit.train.agreement import StopRequest, keep_equal
from lorakit.train.arguments import StepBatchSampler, training_arguments, with_faster_b
from lorakit.train.batch_layout import count_trained_tokens, without_labels
from lorakit.train.checkpoint import (
    OPTIMIZER,
    SCHEDULER,
    restore_device_generator,
    save_device_generator,
    save_model_state,
)
from lorakit.train.micro_batching import MicroBatchRunner, StepLoss
from lorakit.train.samples import SampleAnswers
from lorakit.train.setup import LoadBase


class EvaluationJudge(Protocol):
    """Hears every held-out loss; from then on that it `is_over`, the run ends as one that stops early."""

    is_over: bool

    def hear(self, step: int, loss: float) -> None:
        """The held-out loss after a step."""


@dataclass(frozen=True)
class TrainingHooks:
    """What a training is told besides its recipe. `judge`: hears the held-out losses. `rate_share`: of each step from 0
    on, its learning rate as a share of `train.learning_rate`, in place of the schedule. `load_base`: takes the
    place of `load_model` for a base that is held whole."""

    judge: EvaluationJudge | None = None
    rate_share: Callable[[int], float] | None = None
    load_base: LoadBase | None = None


class TrainingCallback(TrainerCallback):
    """What the trainer has to do inside the library's loop: move ranks, and decide what follows a step."""

    def __init__(self, trainer: "SupervisedTrainer") -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if scheduler := self.trainer.rank_scheduler:  # the gradients are still there
            optimizer = given["optimizer"]
            scheduler.after_step(state.global_step + 1, getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.busy += time.monotonic() - self.trainer.step_start
        self.trainer.steps += 1
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.trainer.eval_dataset is not None
            control.should_save = True
        if self.trainer.stopping.agreed():
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True


class SupervisedTrainer(SFTTrainer):
    """Trains on examples that are rendered and masked already. Its batch is a whole optimizer step."""

    def __init__(
        self,
        runner: MicroBatchRunner,
        run: Run,
        bar: Bar,
        stopping: StopRequest,
        hooks: "TrainingHooks",
        tracking: Tracking,
    ) -> None:
        prepared = runner.prepared
        self.runner, self.rank_scheduler, self.progress = runner, runner.rank_scheduler, runner.progress
        self.sharding = runner.sharding
        self.shared: Any = None  # the optimizer, where the processes share out its states
        self.run, self.bar, self.stopping = run, bar, stopping
        self.hooks, self.tracking, self.samples = hooks, tracking, SampleAnswers(runner)
        self.prepared, self.settings = prepared, prepared.recipe.train
        self.tokens, self.step_tokens, self.steps, self.busy, self.step_start = 0, 0, 0, 0.0, 0.0
        self.loss: StepLoss
        self._tr_loss: torch.Tensor
        self.source: Any = None  # of rows
        self.next_step: tuple[Any, Any] = None, None  # the rows of the next step with their source, on a GPU
        self.fetch_next: Callable[[], tuple[Any, Any]]
        self.control: TrainerControl
        self.lr_scheduler: Any
        adapter = runner.model.named_parameters() if isinstance(runner.model, PeftModel) else ()
        weights = {name: parameter.detach().clone() for name, parameter in adapter if parameter.requires_grad}
        super().__init__(
            model=runner.model,
            args=training_arguments(prepared, run),
            train_dataset=prepared.train.rows,
            eval_dataset=prepared.held_out.rows if prepared.held_out else None,
            processing_class=prepared.tokenizer,
            data_collator=_step,
            callbacks=[TrainingCallback(self)],
        )
        self.remove_callback(PrinterCallback)
        # SFTTrainer rounds the adapter of a quantized base to bfloat16; it is trained in the type it was made in.
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data = weights[name]
        runner.backward = self.accelerator.backward

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows of one step at a time: how they are split is decided when it is made."""
        examples, settings = self.prepared.train, self.settings
        sampler = StepBatchSampler(examples.lengths().tolist(), settings.batch_size, settings.seed, examples.mixture)
        generator = torch.Generator()  # a separate one: the global one belongs to dropout
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=_step, generator=generator)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Any, Any]:
        """The rows of the next step, which on a GPU were fetched while it computed the one before."""
        source, batches = self.next_step
        if source is not epoch_iterator:
            batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.fetch_next = partial(super().get_batch_samples, epoch_iterator, num_batches, device)
        self.source, self.next_step = epoch_iterator, (None, None)
        return batches

    def _prepare_next_step(self) -> None:
        """Bring the rows of the next step to the GPU while it computes this one; an epoch's last step has none."""
        batches = self.fetch_next()
        self.next_step = self.source, batches
        for batch in batches[0]:
            self.runner.prepare_ahead(batch["rows"])

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """None: the rows of a step know their trained tokens, and nothing is sent to the device for them."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["trained_tokens"] = self.step_tokens
        super().log(logs, start_time)
        step = self.state.global_step
        line = {"step": step, "epoch": round(self.state.epoch or 0.0, 4)}
        if "eval_loss" in logs:
            self._record(line | {"eval_loss": logs["eval_loss"]})
        if "loss" not in logs:
            return
        self.tokens += self.step_tokens
        if not self.args.fp16 and not math.isfinite(logs.get("grad_norm", 0.0)):  # fp16's loss scaler skips such steps
            refuse(LorakitError(f"step {step}: the gradient is {logs['grad_norm']}. Lower train.learning_rate."))
        speed = self.tokens / self.busy if self.busy else 0.0
        facts = {name: logs.get(name) for name in ("loss", "grad_norm", "learning_rate")}
        self._record(line | facts | {"trained_tokens_per_second": round(speed, 1)})
        self.bar.advance(1, f"loss {logs['loss']:.4f}  {speed:,.0f} trained tokens/s")

    def _record(self, figures: dict[str, Any]) -> None:
        """Add a line to the run's log, which the trackers get with the most memory that was taken so far."""
        if is_first():
            self.run.log_line(figures)
        if self.tracking.following:
            self.tracking.log(figures | {"peak_memory": run_peak(self.runner.device)})

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The passes of a step. Its loss is read together with the norm of the gradient, in `_get_grad_norm`."""
        self.step_start, self.step_tokens = time.monotonic(), inputs["tokens"]
        self.loss = self.runner.run_step(inputs["rows"], self.step_tokens, self.state.global_step + 1)
        self._tr_loss = self._tr_loss.cpu()  # the library would keep it on the device
        return torch.zeros(())

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss: the mean over all trained tokens of the held-out rows."""
        rows, step = self.eval_dataset, self.state.global_step
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        order = deal(order, rank(), world_size())
        self.model.eval()
        total, tokens, done, start = 0.0, 0, 0, time.monotonic()
        with self.progress.bar("held-out loss", total=len(rows)) as bar:
            while any_of(done < len(order)) == (True,):
                if self.stopping.agreed():
                    # One that is made up after resuming has its checkpoint, and the random states are not loaded yet.
                    if from_first(not self.run.checkpoint(step).is_dir()):
                        self._save_checkpoint(self.model, None)
                    refuse(Interrupted("stopped during an evaluation; --resume goes on from its checkpoint"))
                some = [rows[index] for index in order[done : done + self.runner.held_out_batch]]
                # Where processes wait for each other inside a pass, one without a row of its own computes any.
                rest = some or [without_labels(rows[0])] * self.sharding.is_collective
                loss, count, scored = self.sharding.attempt(partial(self.runner.held_out_loss, rest, step))
                scored = min(scored, len(some))
                total, tokens, done = total + loss, tokens + count, done + scored
                bar.advance(scored * world_size())
        total, tokens = (sum(parts) for parts in zip(*gather((total, tokens)), strict=True))
        if not math.isfinite(total):
            refuse(LorakitError(f"step {step}: the held-out loss is {total}. Lower train.learning_rate."))
        metrics = {"eval_loss": total / tokens, "eval_seconds": time.monotonic() - start}
        self.log(dict(metrics))
        if samples := self.samples.answer(step):
            self._record({"step": step, "epoch": round(self.state.epoch or 0.0, 4), "samples": samples})
        self.model.train()
        if self.hooks.judge:
            self.hooks.judge.hear(step, metrics["eval_loss"])
        self.control.should_evaluate = False
        if self.ends_early():
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def ends_early(self) -> bool:
        """Whether the held-out losses measured so far end the run before its last step."""
        early = self.settings.early_stopping
        if self.hooks.judge and self.hooks.judge.is_over:
            return True
        if early is None:
            return False
        settled_at = self.rank_scheduler.settled_at if self.rank_scheduler else 0
        history = self.state.log_history
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] >= settled_at]
        return evaluations_without_gain(losses, early.min_delta) >= early.patience

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW over the trained weights; with LoRA+ the B matrices learn faster by its ratio."""
        optimizer = super().create_optimizer(model)
        if self.settings.lora_plus is not None:
            optimizer.param_groups[:] = with_faster_b(optimizer.param_groups, self.model, self.settings.lora_plus)
        if self.sharding.share_optimizer:
            moves_ranks, clip = self.rank_scheduler is not None, self.settings.max_grad_norm
            self.shared = optimizer = self.sharding.share_optimizer(optimizer, self.runner.run, clip, moves_ranks)
            self.optimizer, self.runner.backward = optimizer, optimizer.backward
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rate of every step as the recipe's schedule has it."""
        if self.lr_scheduler is None:
            warmup = warmup_steps(self.settings, self.prepared.steps)
            share = partial(
                rate_share,
                schedule=self.settings.schedule,
                warmup=warmup,
                steps=num_training_steps,
                least=self.settings.min_rate,
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.hooks.rate_share or share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """When the run was stopped just before an evaluation, make it up first."""
        loop = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.owes_evaluation():
            step = self.state.global_step
            on_first(partial(self.run.forget_evaluation, step))
            self._determine_best_metric(self.evaluate(), None)
            text = json.dumps(asdict(self.state), indent=2, sort_keys=True) + "\n"  # as its `save_to_json` writes it
            on_first(partial(write_atomic, self.run.checkpoint(step) / "trainer_state.json", text))
        return loop

    def owes_evaluation(self) -> bool:
        """Whether the held-out loss after the current step is due and was not measured, since the run was stopped."""
        step = self.state.global_step
        due = step and (step % self.args.eval_steps == 0 or step == self.state.max_steps)
        measured = any(entry["step"] == step and "eval_loss" in entry for entry in self.state.log_history)
        return bool(due and self.eval_dataset is not None and not measured)

    def _run_epoch(self, **epoch: Any) -> None:
        """Nothing more, where the run was resumed after its last step: the loop looks only after a further one."""
        if self.state.global_step >= self.state.max_steps or self.ends_early():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**epoch)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is always saved. There is none before the adapter has the shape that the recipe asks for."""
        if self.rank_scheduler and self.state.global_step < self.rank_scheduler.settled_at:
            return False
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self.control.should_save = True
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything that the next step depends on, under its final name only when it is complete."""
        keep_equal(self.model, self.sharding, self.progress)
        weights = self.sharding.whole_on_first(trained_parameters(self.model))
        optimizer = self.sharding.optimizer_state(self.optimizer)
        on_first(partial(self._write_checkpoint, weights, optimizer))

    def _write_checkpoint(self, weights: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        self.store_flos()
        with atomic_dir(self.run.checkpoint(self.state.global_step)) as draft:
            save_model_state(self.model, weights, self.rank_scheduler, draft)
            torch.save(optimizer, draft / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), draft / SCHEDULER)
            self._save_scaler(str(draft))
            self._save_rng_state(str(draft))
            self.state.save_to_json(str(draft / "trainer_state.json"))
        self.run.prune_checkpoints(self.settings.keep, self.state.best_global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_device_generator(self.runner.device, Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint:
            restore_device_generator(self.runner.device, Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            optimizer, scheduler = (
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
                for name in (OPTIMIZER, SCHEDULER)
            )
            self.sharding.load_optimizer_state(self.optimizer, optimizer)
            self.lr_scheduler.load_state_dict(scheduler)

    def _clip_grad_norm(self, model: Any) -> Any:
        """The norm of the gradients, which are clipped to the recipe's. One that is shared out clips in its step, and
        the tensor gets the norm then."""
        return self.shared.norm if self.shared else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the gradients; here a step waits for the device, before its weights change."""
        norm = None if self.shared else self.sharding.whole(super()._get_grad_norm(model, grad_norm))
        if self.runner.works_ahead:
            self._prepare_next_step()
        loss, length = self.runner.read_loss(self.loss, norm)
        self._tr_loss += loss
        return self.shared.norm if self.shared else length

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the weights of the checkpoint are in the model before the trainer is made."""


def _step(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows, "tokens": count_trained_tokens(rows)}


def evaluations_without_gain(losses: list[float], min_delta: float) -> int:
    """How many of the last losses in a row did not fall below the best before them by more than `min_delta`."""
    best, waited = math.inf, 0
    for loss in losses:
        if loss < best - min_delta:
            best, waited = loss, 0
        else:
            waited += 1
    return waited
