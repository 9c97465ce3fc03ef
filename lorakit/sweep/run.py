"""A worker of a sweep: it takes trial after trial, trains each as a plain run, and ends early those that are behind."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakit.amounts import counted, duration
from lorakit.errors import Interrupted, LorakitError, first_line
from lorakit.hardware.memory import free_memory
from lorakit.progress import Progress
from lorakit.run_dir import Run, open_run
from lorakit.sweep.study import STATES, Claim, TrialStore
from lorakit.sweep.sweep_file import Sweep, describe_values

_FIRST_RUNG = 0.2
"""The share of a run before which none is cut short: losses after fewer steps tell little about the last one."""
_FACTOR = 3


@dataclass
class TrialJudge:
    """Hears the held-out losses of a trial and says when it ends early. `is_over`: that it did."""

    trial: Any
    reported: set[int]
    is_over: bool = False

    def hear(self, step: int, loss: float) -> None:
        """A held-out loss after a step; of one that was measured again after a restart nothing is new."""
        if step not in self.reported:
            self.trial.report(loss, step)
            self.reported.add(step)
        self.is_over = bool(self.trial.should_prune())


def run_worker(
    sweep: Sweep, store: TrialStore, progress: Progress, quiet: Callable[[], Progress], deadline: float | None
) -> None:
    """Do trials until none is left or, by the monotonic clock, the `deadline` has passed. Interrupted after Ctrl-C: the
    trial's run has a checkpoint, and the next worker goes on. `quiet` makes what a trial's training reports to."""
    while deadline is None or time.monotonic() < deadline:
        claim = store.claim()
        if claim is None:
            return
        try:
            _run_trial(sweep, store, claim, progress, quiet())
        finally:
            claim.release()
            free_memory()
    progress.say("the budget is used up: no further trial begins")


def _run_trial(sweep: Sweep, store: TrialStore, claim: Claim, progress: Progress, quiet: Progress) -> None:
    number = claim.trial.number
    name = f"trial {number + 1} of {store.planned()}: {describe_values(claim.values)}"
    progress.say(name)
    start = time.monotonic()
    try:
        loss, was_pruned = _train(sweep, store, claim, quiet)
    except (Interrupted, KeyboardInterrupt):
        store.give_back(claim.trial)
        raise
    except (LorakitError, RuntimeError, MemoryError, ValueError, OSError) as error:
        store.fail(claim.trial, first_line(error))
        progress.warn(f"{name}: failed, and the others go on: {first_line(error)}")
        return
    store.finish(claim.trial, loss, was_pruned)
    how = "cut short, " if was_pruned else ""
    progress.say(f"{name}: {how}held-out loss {loss:.4f}, in {duration(time.monotonic() - start)}")


def _train(sweep: Sweep, store: TrialStore, claim: Claim, progress: Progress) -> tuple[float, bool]:
    """The best held-out loss of a trial, and whether it was cut short."""
    from lorakit.prepare import prepare_run
    from lorakit.train.checkpoint import checkpoint_to_resume, resumed_recipe
    from lorakit.train.run import train
    from lorakit.train.trainer import TrainingHooks

    loaded, run = sweep.load(claim.values, claim.folder), Run(claim.folder)
    resume = bool(run.complete_checkpoints())
    if run.is_complete():  # killed between its end and the telling of it
        result = run.read_manifest()["result"]
        return float(result["eval_loss"]), bool(result["stopped_early"])
    with open_run(run.folder, resume, overwrite=not resume and run.holds_results()) as opened:
        recipe = resumed_recipe(opened, loaded) if resume else loaded.recipe
        prepared = prepare_run(recipe, progress)
        checkpoint = checkpoint_to_resume(opened, prepared, progress) if resume else None
        judge = _judge(sweep, store, claim, prepared.steps, checkpoint)
        outcome = train(prepared, opened, progress, checkpoint, TrainingHooks(judge=judge))
    was_cut = judge.is_over and outcome.steps < prepared.steps
    if outcome.eval_loss is None:
        raise LorakitError("no held-out loss was measured")
    return outcome.eval_loss, was_cut


def _judge(sweep: Sweep, store: TrialStore, claim: Claim, steps: int, checkpoint: Any) -> TrialJudge:
    stored = store.trials[claim.trial.number].intermediate_values
    store.study.pruner = _pruner(sweep, steps)
    judge = TrialJudge(claim.trial, set(stored))
    if checkpoint is not None and stored:  # it was maybe cut short just before its worker was killed
        done = int(checkpoint.name.removeprefix("step-"))
        judge.is_over = max(stored) <= done and bool(claim.trial.should_prune())
    return judge


def _pruner(sweep: Sweep, steps: int) -> Any:
    from optuna import pruners

    first = max(1, round(_FIRST_RUNG * steps))
    match sweep.prune:
        case "median":
            return pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=first)
        case "successive-halving":
            return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=_FACTOR)
        case "hyperband":
            return pruners.HyperbandPruner(min_resource=first, max_resource=steps, reduction_factor=_FACTOR)
    return pruners.NopPruner()


def describe_state(store: TrialStore) -> str:
    """How many trials have ended how, in words."""
    states = [trial.state.name for trial in store.trials]
    parts = [f"{states.count(state)} {word}" for state, word in STATES.items() if state in states]
    return f"{counted(len(states), 'trial')}: {', '.join(parts)}" if parts else "no trials yet"
