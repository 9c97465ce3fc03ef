"""A worker of a sweep: it takes trial after trial, trains each as a plain run, and ends early those that are behind."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorakit.amounts import counted, duration
from lorakit.data.rows import IGNORED
from lorakit.errors import Interrupted, LorakitError, first_line, is_of_the_disk
from lorakit.hardware.memory import free_memory
from lorakit.progress import Progress
from lorakit.run_dir import Run, open_run
from lorakit.sweep.study import CUT, STATES, Claim, RowsDiffer, TrialStore
from lorakit.sweep.sweep_file import Sweep, describe_values

if TYPE_CHECKING:
    from lorakit.model.peft_adapter import SharedBase
    from lorakit.model.resolve import Base
    from lorakit.recipe.schema import Model

_FIRST_RUNG = 0.2
"""The share of a run before which none is cut short: losses after fewer steps tell little about the last one."""
_FACTOR = 3


@dataclass
class TrialJudge:
    """Hears the held-out losses of a trial and says when it ends early. `is_over`: that it did."""

    trial: Any
    reported: set[int]
    cut_at: int | None = None
    is_over: bool = False

    def hear(self, step: int, loss: float) -> None:
        """A held-out loss after a step; of one that was measured again after a restart nothing is new."""
        if step not in self.reported:
            self.trial.report(loss, step)
            self.reported.add(step)
        # Some of Optuna's pruners say it once alone: it is noted, for whoever goes on after a kill.
        if self.cut_at is None and step == max(self.reported) and self.trial.should_prune():
            self.cut_at = step
            self.trial.set_user_attr(CUT, step)
        self.is_over = self.cut_at is not None and step >= self.cut_at


class TrialBases:
    """Loads the bases of trials, in turn: one that the trial before had too is in memory already."""

    def __init__(self) -> None:
        self._key: Any = None
        self._shared: SharedBase | None = None

    def load(self, base: "Base", settings: "Model", device: str, trainable: bool) -> Any:
        """What `load_model` gives. One that is to be trained whole is no other trial's."""
        from lorakit.model.load import load_model
        from lorakit.model.peft_adapter import SharedBase

        key = None if trainable else (base.folder, base.sha256(), settings, device)
        if key is None or key != self._key:
            self._key, self._shared = key, None
        if key is None:
            return load_model(base, settings, device, trainable)
        if self._shared is None:
            self._shared = SharedBase(partial(load_model, base, settings, device))
        return self._shared.copied()


def run_worker(
    sweep: Sweep, store: TrialStore, progress: Progress, quiet: Callable[[], Progress], deadline: float | None
) -> None:
    """Do trials until none is left or, by the monotonic clock, the `deadline` has passed. Interrupted after Ctrl-C: the
    trial's run has a checkpoint, and the next worker goes on. `quiet` makes what a trial's training reports to."""
    bases = TrialBases()
    while deadline is None or time.monotonic() < deadline:
        claim = store.claim()
        if claim is None:
            return
        try:
            _run_trial(sweep, store, claim, bases, progress, quiet())
        finally:
            claim.release()
            free_memory()
    progress.say("the budget is used up: no further trial begins")


def _run_trial(
    sweep: Sweep, store: TrialStore, claim: Claim, bases: TrialBases, progress: Progress, quiet: Progress
) -> None:
    number = claim.trial.number
    name = f"trial {number + 1} of {store.planned()}: {describe_values(claim.values)}"
    progress.say(name)
    start = time.monotonic()
    try:
        loss, was_pruned = _train(sweep, store, claim, bases, quiet)
    except (Interrupted, KeyboardInterrupt):
        store.give_back(claim.trial)
        raise
    except (LorakitError, RuntimeError, MemoryError, ValueError, OSError) as error:
        if isinstance(error, RowsDiffer) or is_of_the_disk(error):  # so would all that come after it
            store.give_back(claim.trial)
            raise
        store.fail(claim.trial, first_line(error))
        progress.warn(f"{name}: failed, and the others go on: {first_line(error)}")
        return
    store.finish(claim.trial, loss, was_pruned)
    how = "cut short, " if was_pruned else ""
    progress.say(f"{name}: {how}held-out loss {loss:.4f}, in {duration(time.monotonic() - start)}")


def _train(sweep: Sweep, store: TrialStore, claim: Claim, bases: TrialBases, progress: Progress) -> tuple[float, bool]:
    """The best held-out loss of a trial, and whether it was cut short."""
    from lorakit.data.examples import file_sha256s
    from lorakit.prepare import prepare_run
    from lorakit.train.checkpoint import checkpoint_to_resume, resumed_recipe
    from lorakit.train.run import train
    from lorakit.train.trainer import TrainingHooks

    loaded, run = sweep.load(claim.values, claim.folder), Run(claim.folder)
    resume = bool(run.complete_checkpoints())
    if run.is_complete():  # killed between its end and the telling of it
        facts = run.read_manifest()
        return float(facts["result"]["eval_loss"]), _was_cut(claim, facts["result"]["steps"], facts["steps"])
    with open_run(run.folder, resume, overwrite=not resume and run.holds_results()) as opened:
        recipe = resumed_recipe(opened, loaded) if resume else loaded.recipe
        prepared = prepare_run(recipe, progress)
        store.share_rows(_trained(prepared.held_out), file_sha256s(recipe.data))
        checkpoint = checkpoint_to_resume(opened, prepared, progress) if resume else None
        judge = _judge(sweep, store, claim, prepared.steps, checkpoint)
        outcome = train(prepared, opened, progress, checkpoint, TrainingHooks(judge=judge, load_base=bases.load))
    if outcome.eval_loss is None:
        raise LorakitError("no held-out loss was measured")
    return outcome.eval_loss, _was_cut(claim, outcome.steps, prepared.steps)


def _was_cut(claim: Claim, steps: int, planned: int) -> bool:
    """Whether it was the judge that ended a trial, and not its last step or its recipe's early stopping."""
    return steps < planned and claim.trial.user_attrs.get(CUT) == steps


def _trained(held_out: Any) -> list[list[int]]:
    """The trained tokens of each held-out row."""
    return [[token for token in row["labels"] if token != IGNORED] for row in held_out.rows] if held_out else []


def _judge(sweep: Sweep, store: TrialStore, claim: Claim, steps: int, checkpoint: Any) -> TrialJudge:
    stored = store.trials[claim.trial.number].intermediate_values
    store.study.pruner = _pruner(sweep, steps)
    judge = TrialJudge(claim.trial, set(stored), claim.trial.user_attrs.get(CUT))
    if checkpoint is not None and judge.cut_at is not None:
        judge.is_over = judge.cut_at <= int(checkpoint.name.removeprefix("step-"))
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
