"""One training run: a prepared recipe -> an adapter in a run's folder."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lorakit.amounts import counted, percent
from lorakit.errors import Interrupted, LorakitError, UserError, explain_error, first_line
from lorakit.hardware.memory import free_memory, is_out_of_memory, return_freed_memory
from lorakit.model.adapters.svd import ranks_in_words
from lorakit.model.quantization_config import refuse_irreversible, stored_quantization
from lorakit.plan.schedule import warmup_steps
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run
from lorakit.train.callbacks import StopRequest, TrainingCallback
from lorakit.train.checkpoint import restore_model_state
from lorakit.train.memory_probe import describe_probe, probe_longest
from lorakit.train.micro_batching import (
    MicroBatchRunner,
    compute_optimizations,
    set_gradient_checkpointing,
    uses_gradient_checkpointing,
)
from lorakit.train.optimizer import share_in_8_bits, states_do_not_fit
from lorakit.train.preflight import check_loss
from lorakit.train.record import RunRecord, initial_manifest, peak_memory, save_result
from lorakit.train.setup import set_up_training
from lorakit.train.trainer import SupervisedTrainer


@dataclass(frozen=True)
class Outcome:
    """The result of a finished training. `loss` is the last step's, `eval_loss` the best held-out one."""

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
    """The rows, or packs, that were computed at once in the end: fewer than the recipe's where memory ran out."""
    gradient_checkpointing: bool


def train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None = None) -> Outcome:
    """Train the adapter of a prepared recipe into `run`, from the start or from a checkpoint of the same run.

    The run is one that `open_run` holds.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run's folder has a checkpoint of the last whole step.
        LorakitError: the loss is not a number, or memory ran out.
    """
    _refuse(prepared)
    try:
        return _train(prepared, run, progress, checkpoint)
    except LorakitError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
            raise LorakitError(
                f"out of memory outside the forward and backward passes: {first_line(error)}. "
                "lorakit plan tells what fits."
            ) from error
        explained = explain_error(error)
        if explained is None:
            raise
        written = run.complete_checkpoints()
        remedy = f"--resume goes on after {written[-1].name}" if written else "no checkpoint was written yet"
        raise type(explained)(
            f"{run.folder}: the training stopped: {explained} Nothing is half written; {remedy}."
        ) from error


def _refuse(prepared: Prepared) -> None:
    """Refuse what cannot work, as far as it is known before the model is loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lorakit trains on one device: start `lorakit train` itself, not through a launcher.")
    if prepared.recipe.output.merged:
        refuse_irreversible(stored_quantization(prepared.base.folder), prepared.base.name)
    warmup = warmup_steps(prepared.recipe.train, prepared.steps)
    if warmup and warmup >= prepared.steps:
        raise UserError(
            f"train.warmup: {counted(warmup, 'step')} of warm-up in a run of {prepared.steps:,}: the learning rate "
            "would never be reached. Write less, or a fraction such as 0.03."
        )


def _train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None) -> Outcome:
    settings = prepared.recipe.train
    if settings.gradient_checkpointing and not prepared.machine.is_gpu:
        return_freed_memory()  # before the weights: what loading leaves free would be filled by what is recomputed
    state = set_up_training(prepared, checkpoint, progress)
    if settings.optimizer.endswith("8bit"):
        progress.say(f"train.optimizer: {percent(share_in_8_bits(state.model))} of its states are in 8 bits")
    check_loss(state.model, prepared)
    free_memory()  # of loading and of the check
    record = RunRecord(run, prepared.recipe, run.read_manifest() if checkpoint else initial_manifest(prepared, state))
    runner, stopping = MicroBatchRunner(state, prepared, progress, record.add_out_of_memory), StopRequest(progress)
    with stopping.listening():
        outcome = _fit(runner, record, stopping, checkpoint)
        if state.rank_scheduler:
            progress.say(ranks_in_words(state.model))
        manifest = record.complete(outcome.__dict__)
        run.write_manifest(manifest | save_result(state, prepared, run, manifest))
    if stopping() and prepared.recipe.output.merged:
        raise Interrupted("stopped before the merge; the adapter is complete, --resume merges it")
    return outcome


def _fit(runner: MicroBatchRunner, record: RunRecord, stopping: StopRequest, checkpoint: Path | None) -> Outcome:
    """The training itself. The folder is cleared only when nothing can be refused any more."""
    prepared, settings, run, scheduler = runner.prepared, runner.recipe.train, record.run, runner.rank_scheduler
    steps, done = prepared.steps, int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    set_gradient_checkpointing(runner.model, bool(settings.gradient_checkpointing))
    start = time.monotonic()
    with runner.progress.bar("training", total=steps, done=done) as bar:
        held_out = prepared.held_out is not None
        callback = TrainingCallback(run, bar, stopping, settings.early_stopping, held_out, scheduler)
        trainer = SupervisedTrainer(runner=runner, run=run, stopping=stopping, callback=callback)
        if not checkpoint:
            run.clear()
        record.write()
        run.go_back_to(done)
        with compute_optimizations(runner.model, prepared.recipe.model.dtype):
            if prepared.machine.is_gpu and done < steps:
                expected = prepared.expected.allocated if prepared.expected else None
                words = describe_probe(probe_longest(runner, done + 1), prepared.machine.memory, expected)
                runner.progress.say(words)
            _run_loop(trainer, checkpoint)
    end = trainer.state
    ended = end.global_step >= steps or callback.ends_early(end)
    if stopping() and (not ended or trainer.owes_evaluation()):
        raise Interrupted(
            f"stopped after step {end.global_step} of {steps}; its checkpoint is complete, --resume goes on from it"
        )
    if end.best_global_step and end.best_global_step != end.global_step:
        restore_model_state(runner.model, scheduler, run.checkpoint(end.best_global_step))
    return _outcome(trainer, time.monotonic() - start)


def _run_loop(trainer: SupervisedTrainer, checkpoint: Path | None) -> None:
    """Train to the end. A step's passes recover where memory runs out; the optimizer cannot: it is half done."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (RuntimeError, MemoryError) as error:
        if not (trainer.callback.optimizing and is_out_of_memory(error)):
            raise
        when = f"at step {trainer.state.global_step + 1}"
        raise LorakitError(states_do_not_fit(trainer.runner.model, trainer.settings.optimizer, when)) from error


def _outcome(trainer: SupervisedTrainer, seconds: float) -> Outcome:
    state, callback, runner = trainer.state, trainer.callback, trainer.runner
    return Outcome(
        steps=state.global_step,
        loss=next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        eval_loss=state.best_metric,
        best_step=state.best_global_step,
        stopped_early=callback.ends_early(state),
        seconds=round(seconds, 1),
        seconds_a_step=round(callback.busy / callback.steps, 3) if callback.steps else 0.0,
        trained_tokens_per_second=round(callback.tokens / callback.busy, 1) if callback.busy else 0.0,
        peak_memory=peak_memory(),
        micro_batch=runner.micro_batch,
        gradient_checkpointing=uses_gradient_checkpointing(runner.model),
    )
