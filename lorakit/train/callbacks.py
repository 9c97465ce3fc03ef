"""Callbacks of the training loop: the log, the progress bar, early stopping, stopping on a signal, moving ranks."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.errors import LorakitError
from lorakit.model.adapters import RankScheduler
from lorakit.progress import Bar, Progress
from lorakit.recipe.schema import EarlyStopping
from lorakit.run_dir import Run

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Set by Ctrl-C, SIGTERM or SIGHUP: the step ends, a checkpoint is written, the run stops. A second one kills."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.signal = progress, 0

    def __call__(self) -> bool:
        return bool(self.signal)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals, except ignored ones (nohup ignores SIGHUP); only a program's main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._received)
            for number in _STOPS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGHUP:
            return  # it follows by itself: systemd sends it after SIGTERM, and a closed terminal more than one
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        self.progress.warn("stopping: this step ends and a checkpoint is written (again to stop at once)")


class TrainingCallback(TrainerCallback):
    """Writes the log, moves the bar and the ranks, and tells the trainer when to evaluate, save and stop."""

    def __init__(
        self,
        run: Run,
        bar: Bar,
        stopping: StopRequest,
        early: EarlyStopping | None,
        held_out: bool,
        scheduler: RankScheduler | None,
    ) -> None:
        self.run, self.bar, self.stopping, self.early, self.held_out = run, bar, stopping, early, held_out
        self.rank_scheduler = scheduler
        self.tokens, self.steps, self.busy, self.step_start = 0, 0, 0.0, 0.0
        self.optimizing = False

    def ends_early(self, state: TrainerState) -> bool:
        """Whether the held-out losses measured so far end the run before its last step."""
        if self.early is None:
            return False
        settled_at = self.rank_scheduler.settled_at if self.rank_scheduler else 0
        history = (entry for entry in state.log_history if entry["step"] >= settled_at)
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        return evaluations_without_gain(losses, self.early.min_delta) >= self.early.patience

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_start = time.monotonic()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizing = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        self.optimizing = False
        if self.rank_scheduler:  # the gradients are still there
            self.rank_scheduler.after_step(state.global_step + 1, getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.busy += time.monotonic() - self.step_start
        self.steps += 1
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.held_out
            control.should_save = True
        if self.stopping():
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "eval_loss" in logs:
            self.run.log_line(line | {"eval_loss": logs["eval_loss"]})
        if "loss" not in logs:
            return
        self.tokens += int(logs["trained_tokens"])
        if not args.fp16 and not math.isfinite(logs.get("grad_norm", 0.0)):  # fp16's loss scaler skips such steps
            raise LorakitError(
                f"step {state.global_step}: the gradient is {logs['grad_norm']}. Lower train.learning_rate; the last "
                "checkpoint is from before this step."
            )
        speed = self.tokens / self.busy if self.busy else 0.0
        facts = {name: logs.get(name) for name in ("loss", "grad_norm", "learning_rate")}
        self.run.log_line(line | facts | {"trained_tokens_per_second": round(speed, 1)})
        self.bar.advance(1, f"loss {logs['loss']:.4f}  {speed:,.0f} trained tokens/s")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ends_early(state):
            control.should_save = control.should_training_stop = True


def evaluations_without_gain(losses: list[float], min_delta: float) -> int:
    """How many of the last losses in a row did not fall below the best before them by more than `min_delta`."""
    best, waited = math.inf, 0
    for loss in losses:
        if loss < best - min_delta:
            best, waited = loss, 0
        else:
            waited += 1
    return waited
