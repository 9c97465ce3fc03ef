"""The ranking of a sweep: which trials are best by held-out loss, and which of them cannot be told apart.

Trials that differ in the seed alone are one candidate: their rows' losses are averaged, and how much they differ is the
noise of the sweep. Candidates are compared with the best one pairwise by rows. Of those that cannot be told from it the
one with the fewest trained parameters is recommended.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.atomic_io import write_atomic
from lorakit.evaluate.metric import Comparison, compare, loss
from lorakit.evaluate.models import resolve_models
from lorakit.evaluate.run import EvalSettings, ModelResult, score_models
from lorakit.progress import Progress
from lorakit.recipe.load import to_yaml
from lorakit.run_dir import RANKING, now
from lorakit.share.scores import value_at
from lorakit.sweep.study import BEST, REASON, STATES, TrialStore
from lorakit.sweep.sweep_file import Sweep

_SEED = "train.seed"
_COMPARED = 12
"""Candidates whose rows are scored and compared with the best one; the rest is ranked by the loss alone."""


@dataclass(frozen=True)
class TrialResult:
    """What came of one trial. `state`: finished, cut short, failed, under way or waiting."""

    number: int
    values: dict[str, Any]
    state: str
    loss: float | None = None
    steps: int = 0
    folder: str = ""
    parameters: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Candidate:
    """Finished trials with the same values but for the seed, the best first. `against_best`: paired by rows."""

    values: dict[str, Any]
    trials: tuple[int, ...]
    loss: float
    parameters: int | None
    against_best: Comparison | None = None

    @property
    def is_tied(self) -> bool:
        """Whether it cannot be told from the best one, by rows."""
        return self.against_best is not None and self.against_best.verdict != "worse"


@dataclass(frozen=True)
class SweepRanking:
    """The candidates by their loss, all trials, and what a sweep shows besides. `noise`: the standard deviation of the
    loss over seeds alone; `importance`: each key's share in how the loss varies, by Optuna's fANOVA."""

    candidates: tuple[Candidate, ...]
    trials: tuple[TrialResult, ...]
    recommended: Candidate | None
    noise: float | None = None
    importance: dict[str, float] = field(default_factory=dict)
    rows: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of all trials."""
        return sum(trial.steps for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        candidates = [
            {**asdict(replace(one, against_best=None)), "against_best": one.against_best and one.against_best.to_dict()}
            for one in self.candidates
        ]
        return {
            "candidates": candidates,
            "trials": [asdict(one) for one in self.trials],
            "recommended": None if self.recommended is None else self.recommended.values,
            "noise": self.noise,
            "importance": self.importance,
            "rows": self.rows,
            "steps": self.steps,
        }

    def in_words(self) -> str:
        """Which one to take, and why."""
        if self.recommended is None:
            return "no trial has ended yet"
        best, advised = self.candidates[0], self.recommended
        tied = [one for one in self.candidates if one is best or one.is_tied]
        if len(tied) == 1:
            return "the first one is the best"
        names = f"the best {len(tied)} cannot be told apart on {self.rows:,} rows"
        why = "has the fewest trained parameters" if advised is not best else "has the lowest loss"
        fewest = min((one.parameters or 0) for one in tied)
        if advised is not best and all(one.parameters in (None, fewest) for one in tied):
            why = "has the lowest loss of those"
        return f"{names}: number {self.candidates.index(advised) + 1} {why}"


def rank_trials(store: TrialStore, progress: Progress) -> SweepRanking:
    """Rank what has ended so far; the candidates near the top are scored row by row."""
    trials = tuple(_result(store, trial) for trial in store.trials)
    ended = [trial for trial in trials if trial.state == "finished" and trial.loss is not None]
    groups: dict[str, list[TrialResult]] = {}
    for trial in sorted(ended, key=lambda one: (one.loss, one.number)):
        groups.setdefault(json.dumps(_without_seed(trial.values), sort_keys=True), []).append(trial)
    candidates = sorted((_candidate(of) for of in groups.values()), key=lambda one: one.loss)
    rows, compared = _compare(store, candidates[:_COMPARED], progress)
    ranked = (*compared, *candidates[_COMPARED:])
    tied = [one for at, one in enumerate(ranked) if at == 0 or one.is_tied]
    recommended = min(tied, key=lambda one: (one.parameters or 0, one.loss), default=None)
    noise = _noise([of for of in groups.values() if len(of) > 1])
    return SweepRanking(ranked, trials, recommended, noise, _importance(store), rows)


def _result(store: TrialStore, trial: Any) -> TrialResult:
    run, values = store.run_of(trial.number), store.values_of(trial)
    facts = run.read_manifest() if run.holds_results() else {}
    result = facts.get("result") or {}
    last = next((line["step"] for line in run.read_log("step") if isinstance(line.get("step"), int)), 0)
    loss_of = trial.value if trial.state.name == "COMPLETE" else min(trial.intermediate_values.values(), default=None)
    return TrialResult(
        trial.number,
        values,
        STATES[trial.state.name],
        loss_of,
        int(result.get("steps") or last),
        str(run.folder) if run.folder.is_dir() else "",
        (facts.get("parameters") or {}).get("trainable"),
        str(trial.user_attrs.get(REASON, "")),
    )


def _without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != _SEED}


def _candidate(trials: Sequence[TrialResult]) -> Candidate:
    values = trials[0].values if len(trials) == 1 else _without_seed(trials[0].values)
    losses = [trial.loss for trial in trials if trial.loss is not None]
    return Candidate(values, tuple(one.number for one in trials), statistics.fmean(losses), trials[0].parameters)


def _compare(store: TrialStore, candidates: list[Candidate], progress: Progress) -> tuple[int, list[Candidate]]:
    """The candidates, each with its comparison with the first one, and on how many rows that was."""
    if len(candidates) < 2:
        return 0, candidates
    by_rendering = dict[Any, list[int]]()  # a system text, for one, is before the rows of its own trials alone
    for number in (number for one in candidates for number in one.trials):
        rendering = value_at(store.run_of(number).read_manifest(), "data", "tokens_sha256", "eval")
        by_rendering.setdefault(rendering, []).append(number)
    results = dict[int, ModelResult]()
    for numbers in by_rendering.values():
        model_set = resolve_models([str(store.run_of(number).folder) for number in numbers], progress)
        results |= zip(numbers, score_models(model_set, None, EvalSettings(), progress).models, strict=True)

    def rows_of(one: Candidate) -> np.ndarray:
        return np.mean([results[number].nats for number in one.trials], axis=0)

    tokens = next(iter(results.values())).tokens
    best = {"loss": loss(rows_of(candidates[0]), tokens)}
    measures = [{"loss": loss(rows_of(one), tokens)} for one in candidates[1:]]
    paired = [compare(best, measure)["loss"] for measure in measures]
    others = [replace(one, against_best=of) for one, of in zip(candidates[1:], paired, strict=True)]
    return len(tokens), [candidates[0], *others]


def _noise(groups: Sequence[Sequence[TrialResult]]) -> float | None:
    """The standard deviation within groups, pooled over them."""
    losses = [[one.loss for one in group if one.loss is not None] for group in groups]
    squares = sum(statistics.variance(of) * (len(of) - 1) for of in losses)
    freedom = sum(len(of) - 1 for of in losses)
    return (squares / freedom) ** 0.5 if freedom else None


def _importance(store: TrialStore) -> dict[str, float]:
    """By key, where there are several keys and enough trials for Optuna to say."""
    from optuna.importance import get_param_importances

    ended = [trial for trial in store.trials if trial.state.name == "COMPLETE"]
    if len(store.sweep.spaces) < 2 or len(ended) < 4 or len({trial.value for trial in ended}) < 2:
        return {}
    return {key: round(float(share), 4) for key, share in get_param_importances(store.study).items()}


def write_ranking(sweep: Sweep, store: TrialStore, ranking: SweepRanking) -> Path | None:
    """Write ranking.json and, where there is one to recommend, its recipe as best.yaml; the path of that."""
    facts = {"format": 1, "taken": now(), "name": sweep.name, **ranking.to_dict(), "in_words": ranking.in_words()}
    write_atomic(store.folder / RANKING, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    if ranking.recommended is None:
        return None
    recipe = sweep.load(ranking.recommended.values).recipe
    output = recipe.output.model_copy(update={"dir": None})
    best = store.folder / BEST
    write_atomic(best, to_yaml(recipe.model_copy(update={"output": output}), store.folder))
    return best
