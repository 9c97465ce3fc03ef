"""One training run: a prepared recipe -> an adapter in a run's folder."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import PrinterCallback, TrainerCallback

from lorakit.errors import Interrupted, LorakitError, UserError
from lorakit.folders import write_whole
from lorakit.model.adapters.svd import ranks_in_words
from lorakit.model.fused import fused_lora
from lorakit.model.stored import check_mergeable
from lorakit.plan.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.load import dump
from lorakit.runs import Run, now
from lorakit.train.arguments import arguments, plan_of, warmup_steps
from lorakit.train.begin import Begun, begin, take_up
from lorakit.train.callbacks import Conductor, Driving, StopRequest
from lorakit.train.checks import check_loss
from lorakit.train.optimizer import share_in_8_bits
from lorakit.train.record import manifest_of, peak_memory
from lorakit.train.save import save_result
from lorakit.train.trainer import Plan, SupervisedTrainer


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


def train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None = None) -> Outcome:
    """Train the adapter of a prepared recipe into `run`, from the start or from a checkpoint of the same run.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step lies in the run's folder.
        LorakitError: the loss is not a number, or memory ran out.
    """
    _refuse(prepared)
    with run.alone():
        return _train(prepared, run, progress, checkpoint)


def _train(prepared: Prepared, run: Run, progress: Progress, checkpoint: Path | None) -> Outcome:
    begun = begin(prepared, checkpoint, progress)
    if prepared.recipe.train.optimizer.endswith("8bit"):
        progress.say(f"train.optimizer: {share_in_8_bits(begun.model):.0%} of its states are in 8 bits")
    check_loss(begun.model, prepared)
    manifest = run.read_manifest() if checkpoint else manifest_of(prepared, begun)
    manifest["status"] = "running"

    def open_folder() -> None:
        if not checkpoint:
            run.clear()
        run.write_manifest(manifest)
        write_whole(run.recipe, dump(prepared.recipe, run.folder))

    stopping = StopRequest(progress)
    with stopping.listening():
        outcome = _fit(begun, prepared, run, progress, stopping, checkpoint, open_folder)
    if begun.driver:
        progress.say(ranks_in_words(begun.model))
    manifest |= {"status": "complete", "finished": now(), "result": outcome.__dict__}
    run.write_manifest(manifest | save_result(begun, prepared, run, manifest))
    return outcome


def _refuse(prepared: Prepared) -> None:
    """What cannot work and is known before the model is loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lorakit trains on one device: start `lorakit train` itself, not through a launcher.")
    if prepared.recipe.output.merged:
        check_mergeable(prepared.base)
    warmup = warmup_steps(prepared.recipe.train, prepared.steps)
    if warmup >= prepared.steps > 1:
        raise UserError(
            f"train.warmup: {warmup} steps of warm-up in a run of {prepared.steps}. Write a fraction or fewer."
        )


def _fit(
    begun: Begun,
    prepared: Prepared,
    run: Run,
    progress: Progress,
    stopping: StopRequest,
    checkpoint: Path | None,
    open_folder: Callable[[], None],
) -> Outcome:
    """The training itself. `open_folder` is called when nothing stands against it any more: it clears the folder."""
    recipe, steps, model = prepared.recipe, prepared.steps, begun.model
    done = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    plan = plan_of(prepared)
    held_out = prepared.held_out
    begin = time.monotonic()
    with progress.bar("training", total=steps, done=done) as bar:
        settled_at = begun.driver.settled_at if begun.driver else 0
        conductor = Conductor(run, bar, stopping, recipe.train.early_stopping, held_out is not None, settled_at)
        trainer = _trainer(begun, prepared, run, progress, plan, stopping, conductor)
        open_folder()
        run.go_back_to(done)
        autocast = recipe.model.dtype != "float32"
        try:
            with _without_copies(model, autocast), fused_lora(model):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise LorakitError(
                f"out of memory at step {trainer.state.global_step + 1} with micro_batch {plan.micro_batch}. The "
                f"result does not depend on it: --resume --set train.micro_batch={max(1, plan.micro_batch // 2)}, or "
                "--set train.gradient_checkpointing=true."
            ) from error
    state = trainer.state
    if stopping() and state.global_step < steps:
        raise Interrupted(
            f"stopped after step {state.global_step} of {steps}; its checkpoint is complete, --resume goes on from it"
        )
    if state.best_global_step and state.best_global_step != state.global_step:
        take_up(model, begun.driver, run.checkpoint(state.best_global_step))
    return Outcome(
        steps=state.global_step,
        loss=conductor.loss,
        eval_loss=state.best_metric,
        best_step=state.best_global_step,
        stopped_early=conductor.stopped_early,
        seconds=round(time.monotonic() - begin, 1),
        seconds_a_step=round(conductor.busy / conductor.steps, 3) if conductor.steps else 0.0,
        trained_tokens_per_second=round(conductor.tokens / conductor.busy, 1) if conductor.busy else 0.0,
        peak_memory=peak_memory(),
    )


def _trainer(
    begun: Begun,
    prepared: Prepared,
    run: Run,
    progress: Progress,
    plan: Plan,
    stopping: StopRequest,
    conductor: TrainerCallback,
) -> SupervisedTrainer:
    held_out = prepared.held_out
    trainer = SupervisedTrainer(
        plan=plan,
        examples=prepared.train,
        run=run,
        progress=progress,
        stopping=stopping,
        driver=begun.driver,
        model=begun.model,
        args=arguments(prepared, run, plan),
        train_dataset=prepared.train.rows,
        eval_dataset=held_out.rows if held_out else None,
        processing_class=prepared.tokenizer,
        callbacks=[conductor, *([Driving(begun.driver)] if begun.driver else [])],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _without_copies(model: Any, autocast: bool) -> AbstractContextManager[Any]:
    """Under autocast the product is computed in half precision anyway; PEFT's copies to float32 would cost memory."""
    return disable_input_dtype_casting(model, active=autocast) if isinstance(model, PeftModel) else nullcontext()
