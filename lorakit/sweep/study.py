"""The trials of a sweep in its folder, kept by Optuna's journal: who does which, once, and what came of it.

Several workers share a folder, on one machine or over a file system with locks. Each trial has a lock that its worker
holds, and that the system drops with the worker: a trial that is under way and not locked is gone on with by the next.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorakit.atomic_io import read_json_object, write_atomic
from lorakit.errors import UserError, first_line
from lorakit.run_dir import SWEEP, Run, now, versions
from lorakit.sweep.sweep_file import Sweep, combinations

JOURNAL, BEST, LOCK = "journal.log", "best.yaml", "sweep.lock"
_WAIT = 120  # seconds for another worker that takes a trial
_MOST_STARTS = 3
"""Times that a trial is begun or gone on with before it counts as crashed: it may be what kills its workers."""
STATES = {"COMPLETE": "finished", "PRUNED": "cut short", "FAIL": "failed", "RUNNING": "under way", "WAITING": "waiting"}
"""What we call Optuna's states of a trial."""
REASON, STARTS, CUT = "reason", "starts", "cut"
"""What is noted of a trial beside its values; `cut`: the step after which it is cut short."""
_ROWS = "rows"


@dataclass(frozen=True)
class Claim:
    """A trial that this worker does now, and the values of its keys."""

    trial: Any
    values: dict[str, Any]
    folder: Path
    lock: FileLock

    def release(self) -> None:
        """Let others see that nobody works on it any more."""
        self.lock.release()


class RowsDiffer(UserError):
    """A trial's rows are not those of the trials before it."""


class TrialStore:
    """The study of a sweep's folder."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        self.sweep, self.folder = sweep, folder
        self.study = _open_study(sweep, folder)

    @property
    def trials(self) -> list[Any]:
        """Every trial as Optuna stored it, by number."""
        return list(self.study.get_trials(deepcopy=False))

    def run_of(self, number: int) -> Run:
        return Run(self.folder / f"trial-{number:04d}")

    def values_of(self, trial: Any) -> dict[str, Any]:
        """The values of a trial's keys, as the recipe takes them."""
        return json.loads(trial.user_attrs["values"]) if "values" in trial.user_attrs else {}

    def share_rows(self, held_out: Sequence[Sequence[int]], files: Mapping[str, str]) -> None:
        """Note what is trained of the held-out rows, and the sha256 of the `files` of rows. RowsDiffer where another
        trial had others: their losses would not be of the same rows."""
        digest = hashlib.sha256(json.dumps(list(map(list, held_out))).encode()).hexdigest()
        with FileLock(self.folder / LOCK, timeout=_WAIT):
            noted = self.study.user_attrs.get(_ROWS) or {"held_out": digest, "files": {}}
            changed = [path for path, sha256 in files.items() if noted["files"].get(path, sha256) != sha256]
            if changed:
                raise RowsDiffer(
                    f"{', '.join(changed)}: changed since the first trials were trained on it. Change it back, or "
                    "choose another --output."
                )
            if noted["held_out"] != digest:
                raise RowsDiffer(
                    "the held-out rows of this trial are not those of the trials before it, so their losses cannot be "
                    "ranked. Write data.eval as a file, and sweep no key that changes which rows it has or how a "
                    "tokenizer cuts them."
                )
            self.study.set_user_attr(_ROWS, {**noted, "files": {**noted["files"], **files}})

    def planned(self) -> int:
        """How many trials there are to be in all."""
        return len(self.trials) if self.sweep.search == "grid" else self.sweep.trials

    def claim(self) -> Claim | None:
        """The next trial: one whose worker is gone, else a new one; None where none is left."""
        from optuna.trial import Trial, TrialState

        with FileLock(self.folder / LOCK, timeout=_WAIT):
            for stored in (one for one in self.trials if one.state == TrialState.RUNNING):
                if lock := self._lock(stored.number):
                    trial = Trial(self.study, stored._trial_id)
                    if stored.user_attrs.get(STARTS, 0) < _MOST_STARTS:
                        return self._start(trial, lock)
                    self.fail(trial, f"it was begun {_MOST_STARTS} times, and its worker was killed each time")
                    lock.release()
            states = [one.state for one in self.trials]
            is_left = TrialState.WAITING in states if self.sweep.search == "grid" else len(states) < self.sweep.trials
            if not is_left:
                return None
            self.study.sampler = self._sampler(len(states))
            trial = self.study.ask()
            lock = self._lock(trial.number)
            assert lock is not None  # nobody else takes trials now
            return self._start(trial, lock)

    def _sampler(self, number: int) -> Any:
        """A sampler of its own for each trial: what it draws does not depend on how often the sweep was stopped."""
        from optuna.samplers import RandomSampler, TPESampler

        make = TPESampler if self.sweep.search == "tpe" else RandomSampler
        return make(seed=self.sweep.seed * 100_003 + number)

    def _lock(self, number: int) -> FileLock | None:
        lock = FileLock(self.folder / f"trial-{number:04d}.lock", blocking=False)
        try:
            return lock.acquire().lock
        except Timeout:
            return None

    def _start(self, trial: Any, lock: FileLock) -> Claim:
        values = {key: space.suggest(trial, key) for key, space in self.sweep.spaces.items()}
        trial.set_user_attr("values", json.dumps(values))
        trial.set_user_attr(STARTS, trial.user_attrs.get(STARTS, 0) + 1)
        return Claim(trial, values, self.run_of(trial.number).folder, lock)

    def finish(self, trial: Any, loss: float, was_pruned: bool) -> None:
        """A trial has ended with this held-out loss, early or not."""
        from optuna.trial import TrialState

        self.study.tell(trial.number, *((None, TrialState.PRUNED) if was_pruned else (loss,)))

    def fail(self, trial: Any, reason: str) -> None:
        """A trial has crashed; the others go on."""
        from optuna.trial import TrialState

        trial.set_user_attr(REASON, reason)
        self.study.tell(trial.number, state=TrialState.FAIL)

    def give_back(self, trial: Any) -> None:
        """A trial that was interrupted by its user: that start counts for nothing."""
        trial.set_user_attr(STARTS, trial.user_attrs[STARTS] - 1)


def _open_study(sweep: Sweep, folder: Path) -> Any:
    """The study of a folder, which is new, or this sweep's. UserError where it is something else."""
    optuna = require_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    file = folder / SWEEP
    own = (SWEEP, LOCK, JOURNAL, f"{JOURNAL}.lock")  # another worker may be making it
    if folder.exists() and not file.exists() and any(path.name not in own for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and not a sweep's folder. Choose another with --output.")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK, timeout=_WAIT):
        facts = read_json_object(file)
        _refuse_other_sweep(folder, facts, sweep)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            _drop_torn_line(folder / JOURNAL)
            try:
                storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
                study = optuna.create_study(
                    study_name=sweep.name, storage=storage, direction="minimize", load_if_exists=True
                )
            except (ValueError, KeyError, TypeError) as error:  # what its lines raise that Optuna did not write
                remedy = "Choose another --output; the trials' runs can be used as they are."
                raise UserError(f"{folder / JOURNAL}: damaged: {first_line(error)}. {remedy}") from error
        if sweep.search == "grid":  # a worker may have been killed while it did this
            for values in islice(combinations(sweep), len(study.get_trials(deepcopy=False)), None):
                study.enqueue_trial({key: sweep.spaces[key].encode(value) for key, value in values.items()})
        if facts is None:
            facts = {"format": 1, "versions": versions(), "begun": now(), "name": sweep.name, "sweep": sweep.identity()}
            write_atomic(file, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return study


def _drop_torn_line(journal: Path) -> None:
    """Cut off a last line that a kill or a full disk left without its end: Optuna would write the next one onto it."""
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(journal))
    if not journal.is_file():
        return
    lock.acquire()
    try:
        with journal.open("rb+") as file:
            text = file.read()
            if not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)
    finally:
        lock.release()


def _refuse_other_sweep(folder: Path, facts: dict[str, Any] | None, sweep: Sweep) -> None:
    """UserError where a folder's sweep.json, read as `facts`, is damaged or that of another sweep."""
    if facts is None and not (folder / SWEEP).exists():
        return
    recorded = (facts or {}).get("sweep")
    if not isinstance(recorded, dict):
        raise UserError(f"{folder / SWEEP}: damaged: it does not say which sweep this is. Choose another --output.")
    if not (folder / JOURNAL).is_file():
        raise UserError(f"{folder}: its {JOURNAL}, in which the trials are kept, is gone. Choose another --output.")
    wanted = json.loads(json.dumps(sweep.identity()))
    differing = sorted(key for key, value in wanted.items() if recorded.get(key) != value)
    if "recipe" in differing and isinstance(recorded.get("recipe"), dict):
        before, after = recorded["recipe"], wanted["recipe"]
        keys = dict.fromkeys(key for key in (*before, *after) if before.get(key) != after.get(key))
        differing[differing.index("recipe")] = f"the recipe's {', '.join(keys)}"
    if differing:
        raise UserError(
            f"{folder}: holds another sweep (it differs in {', '.join(differing)}). Choose another folder with "
            "--output, or change the file back. More trials and another budget may be asked for."
        )


def require_optuna() -> Any:
    """Optuna; UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError('a sweep needs Optuna: pip install "lorakit[sweep]".') from error
    return optuna
