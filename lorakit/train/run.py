"""One training run: a prepared recipe -> an adapter in a run's folder."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import PrinterCallback

from lorakit.amounts import counted, percent
from lorakit.errors import Interrupted, LorakitError, UserError, explain_error
from lorakit.hardware.memory import first_line, free_memory, is_out_of_memory, return_freed_memory
from lorakit.model.adapters.svd import ranks_in_words
from lorakit.model.quantization_config import refuse_irreversible, stored_quantization
from lorakit.plan.schedule import warmup_steps
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run
from lorakit.train.arguments import plan_of, training_arguments
from lorakit.train.callbacks import RankSchedulerCallback, StopRequest, TrainingCallback
from lorakit.train.gradient_checkpointing import set_gradient_checkpointing, uses_gradient_checkpointing
from lorakit.train.memory_probe import describe_probe, try_longest_micro_batch
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.optimizer import share_in_8_bits, states_do_not_fit
from lorakit.train.preflight import check_loss
from lorakit.train.record import RunRecord, initial_manifest, peak_memory
from lorakit.train.save import save_result
from lorakit.train.setup import TrainingState, restore, set_up_training
from lorakit.train.trainer import SupervisedTrainer


@dataclass(frozen=True)
class Outcome:
    """What a finished training says of itself. `loss` is the last step's, `eval_loss` the best held-out one."""

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
    """The rows, or packs, that were computed at once in the end: smaller than asked for where memory ran out."""
    gradient_checkpointing: bool


def train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None = None) -> Outcome:
    """Train the adapter of a prepared recipe into `run`, from the start or from a checkpoint of the same run.

    The run is one that `open_run` holds.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step lies in the run's folder.
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
        told = explain_error(error)
        if told is None:
            raise
        written = run.complete_checkpoints()
        behind = f"--resume goes on after {written[-1].name}" if written else "no checkpoint was written yet"
        raise type(told)(f"{run.folder}: the training stopped: {told} Nothing is half written; {behind}.") from error


def _train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None) -> Outcome:
    if prepared.recipe.train.gradient_checkpointing and not prepared.machine.is_gpu:
        return_freed_memory()  # before the weights: what loading leaves free would be filled by what is recomputed
    begun = set_up_training(prepared, checkpoint, progress)
    if prepared.recipe.train.optimizer.endswith("8bit"):
        progress.say(f"train.optimizer: {percent(share_in_8_bits(begun.model))} of its states are in 8 bits")
    check_loss(begun.model, prepared)
    free_memory()  # of loading and of the check
    record = RunRecord(run, prepared.recipe, run.read_manifest() if checkpoint else initial_manifest(prepared, begun))
    stopping = StopRequest(progress)
    with stopping.listening():
        outcome = _fit(begun, prepared, record, progress, stopping, checkpoint)
        if begun.rank_scheduler:
            progress.say(ranks_in_words(begun.model))
        manifest = record.complete(outcome.__dict__)
        run.write_manifest(manifest | save_result(begun, prepared, run, manifest))
    if stopping() and prepared.recipe.output.merged:
        raise Interrupted("stopped before the merge; the adapter is complete, --resume merges it")
    return outcome


def _refuse(prepared: Prepared) -> None:
    """What cannot work and is known before the model is loaded."""
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


def _fit(
    begun: TrainingState,
    prepared: Prepared,
    record: RunRecord,
    progress: Progress,
    stopping: StopRequest,
    checkpoint: Path | None,
) -> Outcome:
    """The training itself. The folder is cleared only when nothing stands against it any more."""
    recipe, steps, run = prepared.recipe, prepared.steps, record.run
    done = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    set_gradient_checkpointing(begun.model, bool(recipe.train.gradient_checkpointing))
    passes = MicroBatchRunner(begun, recipe, plan_of(prepared), progress, record.shrunk)
    start = time.monotonic()
    with progress.bar("training", total=steps, done=done) as bar:
        settled_at = begun.rank_scheduler.settled_at if begun.rank_scheduler else 0
        held_out = prepared.held_out is not None
        callback = TrainingCallback(run, bar, stopping, recipe.train.early_stopping, held_out, settled_at)
        trainer = _trainer(prepared, run, progress, passes, stopping, callback)
        if not checkpoint:
            run.clear()
        record.write()
        run.go_back_to(done)
        with compute_optimizations(begun.model, recipe.model.dtype):
            if prepared.machine.is_gpu and done < steps:
                found, expected = try_longest_micro_batch(passes, prepared, done + 1), prepared.expected
                progress.say(describe_probe(found, prepared.machine.memory, expected.allocated if expected else None))
            _run_steps(trainer, callback, checkpoint)
    state = trainer.state
    ended = state.global_step >= steps or callback.ends_early(state)
    if stopping() and (not ended or trainer.owes_evaluation()):
        raise Interrupted(
            f"stopped after step {state.global_step} of {steps}; its checkpoint is complete, --resume goes on from it"
        )
    if state.best_global_step and state.best_global_step != state.global_step:
        restore(begun.model, begun.rank_scheduler, run.checkpoint(state.best_global_step))
    return Outcome(
        steps=state.global_step,
        loss=next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None),
        eval_loss=state.best_metric,
        best_step=state.best_global_step,
        stopped_early=callback.ends_early(state),
        seconds=round(time.monotonic() - start, 1),
        seconds_a_step=round(callback.busy / callback.steps, 3) if callback.steps else 0.0,
        trained_tokens_per_second=round(callback.tokens / callback.busy, 1) if callback.busy else 0.0,
        peak_memory=peak_memory(),
        micro_batch=passes.micro_batch,
        gradient_checkpointing=uses_gradient_checkpointing(begun.model),
    )


def _run_steps(trainer: SupervisedTrainer, callback: TrainingCallback, checkpoint: Path | None) -> None:
    """The loop. Where a step's passes run out of memory they recover; the optimizer cannot: it is half done."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (RuntimeError, MemoryError) as error:
        if not (callback.optimizing and is_out_of_memory(error)):
            raise
        passes, when = trainer.passes, f"at step {trainer.state.global_step + 1}"
        raise LorakitError(states_do_not_fit(passes.model, passes.recipe.train.optimizer, when)) from error


def _trainer(
    prepared: Prepared,
    run: Run,
    progress: Progress,
    passes: MicroBatchRunner,
    stopping: StopRequest,
    callback: TrainingCallback,
) -> SupervisedTrainer:
    held_out = prepared.held_out
    trainer = SupervisedTrainer(
        passes=passes,
        examples=prepared.train,
        run=run,
        progress=progress,
        stopping=stopping,
        ends_early=callback.ends_early,
        args=training_arguments(prepared, run, passes.plan),
        train_dataset=prepared.train.rows,
        eval_dataset=held_out.rows if held_out else None,
        processing_class=prepared.tokenizer,
        callbacks=[callback, *([RankSchedulerCallback(passes.rank_scheduler)] if passes.rank_scheduler else [])],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
