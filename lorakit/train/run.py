"""One training run: a prepared recipe -> an adapter in a run's folder."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lorakit.amounts import counted
from lorakit.errors import Interrupted, LorakitError, UserError, explain_error
from lorakit.hardware.memory import free_memory, is_out_of_memory, return_freed_memory, run_peak
from lorakit.model.adapters.svd import ranks_in_words
from lorakit.plan.schedule import warmup_steps
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run, now
from lorakit.train.checkpoint import restore_model_state
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.preflight import check_loss, describe_probe, probe_longest, states_do_not_fit
from lorakit.train.record import RunRecord, initial_manifest, save_result
from lorakit.train.setup import set_up_training
from lorakit.train.trainer import SupervisedTrainer

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
        is_main = threading.current_thread() is threading.main_thread()
        numbers = [number for number in _STOPS if is_main and signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._received) for number in numbers}
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


@dataclass(frozen=True)
class Outcome:
    """The result of a finished training. `loss` is the last step's, `eval_loss` the best held-out one, `micro_batch`
    the rows, or packs, that were computed at once in the end: fewer than the recipe's where memory ran out."""

    steps: int
    loss: float | None
    eval_loss: float | None
    best_step: int | None
    stopped_early: bool
    seconds: float
    seconds_a_step: float
    trained_tokens_per_second: float
    peak_memory: int
    micro_batch: int
    gradient_checkpointing: bool


def train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None = None) -> Outcome:
    """Train the adapter of a prepared recipe into `run`, which `open_run` holds, from the start or from a checkpoint of
    the same run. Interrupted after Ctrl-C or SIGTERM: the folder then has a checkpoint of the last whole step.
    LorakitError where the loss is not a number, or memory ran out."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lorakit trains on one device: start `lorakit train` itself, not through a launcher.")
    warmup = warmup_steps(prepared.recipe.train, prepared.steps)
    if warmup and warmup >= prepared.steps:
        raise UserError(
            f"train.warmup: {counted(warmup, 'step')} of warm-up in a run of {prepared.steps:,}: the learning rate "
            "would never be reached. Write less, or a fraction such as 0.03."
        )
    try:
        return _train(prepared, run, progress, checkpoint)
    except LorakitError:
        raise
    except Exception as error:
        explained, written = explain_error(error), run.complete_checkpoints()
        if explained is None:
            raise
        remedy = f"--resume goes on after {written[-1].name}" if written else "no checkpoint was written yet"
        message = f"{run.folder}: the training stopped: {explained} Nothing is half written; {remedy}."
        raise type(explained)(message) from error


def _train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None) -> Outcome:
    settings = prepared.recipe.train
    if settings.gradient_checkpointing and not prepared.machine.is_gpu:
        return_freed_memory()  # before the weights: what loading leaves free would be filled by what is recomputed
    state = set_up_training(prepared, checkpoint, progress)
    check_loss(state.model, prepared)
    free_memory()  # of loading and of the check
    record = RunRecord(run, prepared.recipe, run.read_manifest() if checkpoint else initial_manifest(prepared, state))
    runner, stopping = MicroBatchRunner(state, prepared, progress, record.add_out_of_memory), StopRequest(progress)
    with stopping.listening():
        outcome = _fit(runner, record, stopping, checkpoint)
        if state.rank_scheduler:
            progress.say(ranks_in_words(state.model))
        manifest = record.manifest | {"status": "complete", "finished": now(), "result": outcome.__dict__}
        run.write_manifest(manifest | save_result(state, prepared, run, manifest))
    output = prepared.recipe.output
    if stopping() and (output.merged or output.export):
        what = "the merge" if output.merged else "the exports"
        raise Interrupted(f"stopped before {what}; the training is complete, --resume goes on with what is missing")
    return outcome


def _fit(runner: MicroBatchRunner, record: RunRecord, stopping: StopRequest, checkpoint: Path | None) -> Outcome:
    """The training itself. The folder is cleared only when nothing can be refused any more."""
    prepared, settings, run, scheduler = runner.prepared, runner.recipe.train, record.run, runner.rank_scheduler
    steps, done = prepared.steps, int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    start = time.monotonic()
    with runner.progress.bar("training", total=steps, done=done) as bar:
        trainer = SupervisedTrainer(runner=runner, run=run, bar=bar, stopping=stopping)
        if not checkpoint:
            run.clear()
        record.write()
        run.go_back_to(done)
        with compute_optimizations(runner.model, prepared.recipe.model.dtype):
            if prepared.machine.is_gpu and done < steps:
                runner.progress.say(describe_probe(probe_longest(runner, done + 1), prepared))
            try:  # a step's passes recover where memory runs out; the optimizer cannot: it is half done
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                when = f"at step {trainer.state.global_step + 1}"
                raise LorakitError(states_do_not_fit(runner.model, settings.optimizer, when)) from error
    end = trainer.state
    ended = end.global_step >= steps or trainer.ends_early()
    if stopping() and (not ended or trainer.owes_evaluation()):
        raise Interrupted(f"stopped after step {end.global_step} of {steps}; --resume goes on from its checkpoint")
    if end.best_global_step and end.best_global_step != end.global_step:
        restore_model_state(runner.model, scheduler, run.checkpoint(end.best_global_step))
    return _outcome(trainer, time.monotonic() - start)


def _outcome(trainer: SupervisedTrainer, seconds: float) -> Outcome:
    state, busy = trainer.state, trainer.busy
    return Outcome(
        steps=state.global_step,
        loss=next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        eval_loss=state.best_metric,
        best_step=state.best_global_step,
        stopped_early=trainer.ends_early(),
        seconds=round(seconds, 1),
        seconds_a_step=round(busy / trainer.steps, 3) if trainer.steps else 0.0,
        trained_tokens_per_second=round(trainer.tokens / busy, 1) if busy else 0.0,
        peak_memory=run_peak(trainer.runner.device),  # on a GPU since the probe began
        micro_batch=trainer.runner.micro_batch,
        gradient_checkpointing=trainer.runner.recomputes,
    )
