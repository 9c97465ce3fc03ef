"""One training run: a prepared recipe -> an adapter in a run's folder."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorakit.amounts import counted
from lorakit.atomic_io import write_atomic
from lorakit.distributed.launchers import launched
from lorakit.distributed.processes import copy_from_first, gather, is_first, on_first, refuse, world_size
from lorakit.errors import Interrupted, LorakitError, UserError, explain_error
from lorakit.hardware.allocator import describe_allocator
from lorakit.hardware.memory import free_memory, is_out_of_memory, keep_freed_memory, return_freed_memory, run_peak
from lorakit.model.adapters.svd import ranks_in_words
from lorakit.model.block_code import BlockCode
from lorakit.model.peft_adapter import trained_parameters
from lorakit.plan.schedule import warmup_steps
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import COMPLETE, Run, now
from lorakit.track.tracking import Tracking, track, tracked_config
from lorakit.train.agreement import StopRequest
from lorakit.train.block_check import choose_block_code
from lorakit.train.checkpoint import restore_model_state
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.offloading import offload_activations
from lorakit.train.preflight import check_loss, describe_probe, probe_longest, states_do_not_fit
from lorakit.train.record import RunRecord, initial_manifest, sample_lines, save_result, whole_model
from lorakit.train.setup import set_up_training
from lorakit.train.sharding import sharding_of
from lorakit.train.trainer import SupervisedTrainer, TrainingHooks


@dataclass(frozen=True)
class Outcome:
    """The result of a finished training. `loss` is the last step's, `eval_loss` the best held-out one, `micro_batch`
    of how many of the longest rows a micro-batch had the room in the end: less than the recipe's where memory ran out.
    Of several devices: the most memory of one, the bytes of gradients that each step adds up, and the seconds that this
    takes."""

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
    devices: int = 1
    reduced_bytes: int = 0
    reduction_seconds: float = 0.0


def train(
    prepared: Prepared,
    run: Run,
    progress: Progress,
    checkpoint: Path | None = None,
    hooks: TrainingHooks = TrainingHooks(),  # noqa: B008 (frozen)
) -> Outcome:
    """Train the adapter of a prepared recipe into `run`, which `open_run` holds, from the start or from a checkpoint of
    the same run. `hooks`: what else hears of it, or changes it. Interrupted after Ctrl-C or SIGTERM:
    the folder then has a checkpoint of the last whole step. LorakitError where the loss is not a number, or memory ran
    out. Several processes train it together; the first alone writes, and alone needs to hold `run`."""
    if launched():  # each would train on its own, into the same folder
        raise LorakitError(
            "a launcher started this process, and it has not joined the others: lorakit.distributed.join"
        )
    warmup = warmup_steps(prepared.recipe.train, prepared.steps)
    if warmup and warmup >= prepared.steps:
        message = (
            f"train.warmup: {counted(warmup, 'step')} of warm-up in a run of {prepared.steps:,}: the learning rate "
            "would never be reached. Write less, or a fraction such as 0.03."
        )
        refuse(UserError(message))
    try:
        return _train(prepared, run, progress, checkpoint, hooks)
    except LorakitError:
        raise
    except Exception as error:
        explained, written = explain_error(error), run.complete_checkpoints()
        if explained is None:
            raise
        remedy = f"--resume goes on after {written[-1].name}" if written else "no checkpoint was written yet"
        message = f"{run.folder}: the training stopped: {explained} Nothing is half written; {remedy}."
        raise type(explained)(message) from error


def _train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None, hooks: TrainingHooks) -> Outcome:
    settings = prepared.recipe.train
    fills_holes = settings.gradient_checkpointing or sharding_of(settings).is_collective
    if fills_holes and not prepared.machine.is_gpu:
        return_freed_memory()  # before the weights: what is recomputed or gathered would fill what loading leaves free
    state = set_up_training(prepared, checkpoint, progress, hooks.load_base)
    sharding, trained = state.sharding, trained_parameters(state.model).values()
    copy_from_first(weight.detach() for weight in trained if not sharding.is_shared_out(weight))
    checked = sharding.attempt(partial(check_loss, state.model, prepared, state.run))
    if checked.recipe != prepared.recipe:
        progress.warn("; ".join(str(choice) for choice in checked.choices if choice not in prepared.choices))
    prepared = checked
    free_memory()  # of loading and of the check
    if prepared.machine.device == "cuda":
        progress.say(describe_allocator())
    manifest = on_first(lambda: run.read_manifest() if checkpoint else initial_manifest(prepared, state))
    record = RunRecord(run, prepared.recipe, manifest)
    runner, stopping = MicroBatchRunner(state, prepared, progress, record.add_out_of_memory), StopRequest(progress)
    code = choose_block_code(runner)
    record.manifest["block_code"] = code.words
    with stopping.listening(), record.noting_early_end(), track(run, progress) as tracking:
        outcome = _fit(runner, code, record, stopping, checkpoint, hooks, tracking)
        if state.rank_scheduler:
            progress.say(ranks_in_words(state.model))
        manifest = record.manifest | {"status": COMPLETE, "finished": now(), "result": outcome.__dict__}
        weights = whole_model(state, prepared)
        on_first(lambda: run.write_manifest(manifest | save_result(state, weights, prepared, run, manifest)))
        tracking.log(_final_figures(outcome))
    output = prepared.recipe.output
    if stopping.agreed() and (output.merged or output.export):
        what = "the merge" if output.merged else "the exports"
        message = f"stopped before {what}; the training is complete, --resume goes on with what is missing"
        refuse(Interrupted(message))
    return outcome


def _fit(
    runner: MicroBatchRunner,
    code: BlockCode,
    record: RunRecord,
    stopping: StopRequest,
    checkpoint: Path | None,
    hooks: TrainingHooks,
    tracking: Tracking,
) -> Outcome:
    """The training itself. The folder is cleared only when nothing can be refused any more."""
    prepared, settings, run, scheduler = runner.prepared, runner.recipe.train, record.run, runner.rank_scheduler
    sharding = runner.sharding
    steps, done = prepared.steps, int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    start = time.monotonic()
    with runner.progress.bar("training", total=steps, done=done) as bar:
        trainer = SupervisedTrainer(runner=runner, run=run, bar=bar, stopping=stopping, hooks=hooks, tracking=tracking)
        on_first(partial(_begin_folder, run, record, prepared, checkpoint, done))
        on_first(lambda: tracking.start(prepared.recipe.track, tracked_config(record.manifest), done))
        offloading = offload_activations(runner.model, settings.offload_activations)
        keeping = keep_freed_memory() if _has_room_to_keep(runner) else nullcontext()
        with compute_optimizations(runner.model, prepared.recipe.model.dtype, code), offloading, keeping:
            if prepared.machine.is_gpu and done < steps:
                runner.progress.say(describe_probe(probe_longest(runner, done + 1), prepared))
            try:  # a step's passes recover where memory runs out; the optimizer cannot: it is half done
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                when = f"at step {trainer.state.global_step + 1}"
                message = states_do_not_fit(runner.model, settings.optimizer, when, sharding)
                raise LorakitError(message) from error
    sharding.close(runner.run)
    end = trainer.state
    ended = end.global_step >= steps or trainer.ends_early()
    if stopping() and (not ended or trainer.owes_evaluation()):
        refuse(Interrupted(f"stopped after step {end.global_step} of {steps}; --resume goes on from its checkpoint"))
    if (is_first() or sharding.is_collective) and end.best_global_step and end.best_global_step != end.global_step:
        restore_model_state(runner.model, scheduler, run.checkpoint(end.best_global_step), sharding)
    return _outcome(trainer, time.monotonic() - start)


def _has_room_to_keep(runner: MicroBatchRunner) -> bool:
    """Whether a processor's memory is large enough to keep what is freed for the next tensor, which then may not fit
    exactly: twice what is planned. What is recomputed or gathered is given back at once instead, whatever there is."""
    prepared, expected = runner.prepared, runner.prepared.expected
    returns = runner.recomputes or runner.sharding.is_collective
    return not (prepared.machine.is_gpu or returns) and bool(expected and 2 * expected.total < prepared.machine.memory)


def _begin_folder(run: Run, record: RunRecord, prepared: Prepared, checkpoint: Path | None, done: int) -> None:
    if not checkpoint:
        run.clear()
    record.write()
    write_atomic(run.samples, sample_lines(prepared))
    run.go_back_to(done)


def _final_figures(outcome: Outcome) -> dict[str, float | None]:
    """What trackers are told of a finished training, beside the figures of its last step."""
    best = {"eval_best_loss": outcome.eval_loss, "eval_best_step": outcome.best_step}
    speed = {name: getattr(outcome, name) for name in ("seconds", "seconds_a_step", "trained_tokens_per_second")}
    return {"step": outcome.steps, **best, **speed, "peak_memory": outcome.peak_memory}


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
        peak_memory=max(gather(run_peak(trainer.runner.device))),  # on a GPU since the probe began
        micro_batch=trainer.runner.micro_batch,
        gradient_checkpointing=trainer.runner.recomputes,
        devices=world_size(),
        reduced_bytes=trainer.runner.reduced,
        reduction_seconds=round(trainer.runner.reduction_seconds, 5),
    )
