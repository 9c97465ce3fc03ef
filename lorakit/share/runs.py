"""The runs below a folder: what each was made from, how far it came, and how good it is. Without torch."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.amounts import format_score
from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest, nearest_file
from lorakit.run_dir import CLEARED, COMPLETE, FAILED, Run
from lorakit.share.scores import find_scores, value_at

_DEPTH = 5  # runs/sweep/trial lies two below runs/
_MOST_FOLDERS = 20_000
_BEYOND = 1e100  # no loss is: neither is one that is not a number


@dataclass(frozen=True)
class RunSummary:
    """One run as a table shows it. `state`: finished, running, interrupted, failed, cleared or broken; `reason`: why it
    is failed or broken. Losses are held-out ones; `score` is the main metric of the newest scoring, `verdict` against
    the base. What the folder does not tell is None."""

    folder: Path
    state: str
    reason: str | None = None
    recipe: str | None = None
    base: str | None = None
    revision: str | None = None
    quantization: str | None = None
    data: tuple[str, ...] = ()
    rows: int | None = None
    steps_done: int | None = None
    steps_planned: int | None = None
    best_loss: float | None = None
    best_step: int | None = None
    last_loss: float | None = None
    metric: str | None = None
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    unit: str | None = None
    higher_is_better: bool | None = None
    verdict: str | None = None
    scored: str | None = None
    scores_file: str | None = None
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def date(self) -> str:
        """When it ended, else when it began."""
        return self.finished or self.started or ""

    def to_dict(self) -> dict[str, Any]:
        """The facts for `--json`."""
        return asdict(self) | {"folder": str(self.folder)}


def find_runs(root: Path) -> tuple[list[RunSummary], list[str]]:
    """The runs in a folder and in those below it, and what could not be looked at. Links, hidden folders and the
    insides of runs are not searched. UserError where it is not a folder."""
    if not root.is_dir():
        near = nearest_file(root)
        what = "is a file, not a folder of runs" if root.exists() else "there is no such folder"
        raise UserError(f"{root}: {what}." + (f" Did you mean {root.parent / near}?" if near else ""))
    notes: list[str] = []
    return [summarize_run(run) for run in _search(root, notes)], notes


def _search(root: Path, notes: list[str]) -> Iterator[Run]:
    waiting, examined = [(root, 0)], 0
    while waiting:
        folder, depth = waiting.pop()
        examined += 1
        if examined > _MOST_FOLDERS:
            notes.append(f"only the first {_MOST_FOLDERS:,} folders in {root} were searched")
            return
        try:
            with os.scandir(folder) as entries:
                inside = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except OSError as error:
            notes.append(f"{folder}: cannot be searched: {error.strerror}")
            continue
        if _is_run(folder, inside):
            yield Run(folder)
        elif depth < _DEPTH:
            below = sorted((name for name in inside if inside[name] and not name.startswith(".")), reverse=True)
            waiting += [(folder / name, depth + 1) for name in below]


def _is_run(folder: Path, inside: dict[str, bool]) -> bool:
    """Whether a folder is a run, or what is left of one: other programs have a manifest.json too."""
    run = Run(folder)
    own = [path.name for path in (run.manifest, run.log, run.recipe) if path.name in inside]
    if run.manifest.name in own and run.holds_results():
        return True
    results = [path.name for path in (run.checkpoints, run.adapter) if inside.get(path.name)]
    return len(own) + len(results) > 1 and own != [run.recipe.name]


def summarize_run(run: Run) -> RunSummary:
    """The facts of one run, also of one that is broken."""
    name = run.recipe_name()
    try:
        manifest = run.read_manifest()
        losses = {line["step"]: line["eval_loss"] for line in run.read_log("eval_loss") if _has_loss(line)}
        last = next((line["step"] for line in run.read_log("step") if isinstance(line.get("step"), int)), None)
    except (UserError, OSError) as error:
        return RunSummary(run.folder, "broken", _reason(run, error), name)
    state, reason = _state(run, manifest)
    done = value_at(manifest, "result", "steps")
    best = min(losses, key=lambda step: (losses[step], step), default=None)
    return RunSummary(
        run.folder,
        state,
        reason,
        name,
        **_origin(manifest),
        steps_done=done if isinstance(done, int) else last or 0,
        steps_planned=_of_type(manifest.get("steps"), int),
        best_loss=None if best is None else losses[best],
        best_step=best,
        last_loss=losses[max(losses)] if losses else None,
        **_score(run, manifest),
        started=_of_type(manifest.get("started"), str),
        finished=_of_type(manifest.get("finished"), str),
        seconds=_of_type(value_at(manifest, "result", "seconds"), int | float),
    )


def _reason(run: Run, error: Exception) -> str:
    if not run.manifest.exists():
        return f"it has no {run.manifest.name}"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error).removeprefix(f"{run.folder}: ").removeprefix(f"{run.folder}/").rstrip(".")


def _state(run: Run, manifest: dict[str, Any]) -> tuple[str, str | None]:
    status = manifest.get("status")
    if status == COMPLETE:
        trained = run.adapter if "adapter_sha256" in manifest else run.model
        return ("finished", None) if trained.is_dir() else ("broken", f"its {trained.name}/ is gone")
    if run.is_training():
        return "running", None
    if status == FAILED:
        return "failed", str(manifest.get("failure"))
    return ("cleared" if status == CLEARED else "interrupted"), None


def _origin(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the run was made from."""
    base, sources = manifest["base"], value_at(manifest, "data", "train", "sources")
    paths = [value_at(source, "path") for source in sources] if isinstance(sources, list) else []
    return {
        "base": _of_type(base.get("name"), str),
        "revision": _of_type(base.get("revision"), str),
        "quantization": _of_type(base.get("quantization"), str),
        "data": tuple(path for path in paths if isinstance(path, str)),
        "rows": _of_type(value_at(manifest, "data", "train", "kept"), int),
    }


def _score(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """The main metric of the newest scoring."""
    stored, damaged = find_scores(run, manifest)
    notes = tuple(f"{path}: these scores are damaged, or of another version of lorakit" for path in damaged)
    name = stored.main_score if stored else None
    if stored is None or name is None:
        return {"notes": notes}
    one = stored.scores[name]
    return {
        "metric": name,
        "score": one["value"],
        "score_low": one.get("low"),
        "score_high": one.get("high"),
        "unit": str(one.get("unit")),
        "higher_is_better": one.get("higher_is_better"),
        "verdict": stored.verdict(name),
        "scored": stored.date,
        "scores_file": str(stored.path),
        "notes": notes,
    }


def _has_loss(line: dict[str, Any]) -> bool:
    loss = line.get("eval_loss")
    return isinstance(line.get("step"), int) and isinstance(loss, int | float) and abs(loss) < _BEYOND


def _of_type(value: Any, kind: Any) -> Any:
    return value if isinstance(value, kind) else None


def short_base(run: RunSummary) -> str:
    """The base's name without its organization or folder, and its quantization."""
    name = (run.base or "-").rstrip("/").rpartition("/")[2]
    return name if run.quantization in (None, "none") else f"{name} {run.quantization}"


def short_data(run: RunSummary) -> str:
    """The training data: the first source's name, how many more there are, and the rows."""
    if not run.data:
        return "-"
    first = run.data[0].rstrip("/")
    name = first if first.endswith("]") else first.rpartition("/")[2]  # org/name[split] is a data set of the hub
    more = f" +{len(run.data) - 1}" if len(run.data) > 1 else ""
    return f"{name}{more}" + ("" if run.rows is None else f" ({run.rows:,})")


def short_score(run: RunSummary) -> str:
    """The main metric and its value."""
    return "-" if run.score is None else f"{run.metric} {format_score(run.score, str(run.unit))}"


def _best_score(run: RunSummary) -> Any:
    """By metric, then the best first."""
    if run.score is None:
        return None
    return str(run.metric), run.score if run.higher_is_better is False else -run.score


_VERDICTS = ("better", "higher", "cannot tell", "lower", "worse")
_STATES = ("running", "finished", "interrupted", "failed", "cleared", "broken")
_Key = Callable[[RunSummary], Any]

# How runs are sorted: by a key of each run, None last. By date the newest are first.
SORTS: dict[str, _Key] = {
    "name": lambda run: str(run.folder),
    "recipe": lambda run: run.recipe,
    "base": lambda run: None if run.base is None else short_base(run),
    "data": lambda run: None if not run.data else short_data(run),
    "steps": lambda run: None if run.steps_done is None else -run.steps_done,
    "loss": lambda run: run.best_loss,
    "metric": _best_score,
    "verdict": lambda run: _VERDICTS.index(run.verdict) if run.verdict in _VERDICTS else None,
    "date": lambda run: None if not run.date else [-ord(letter) for letter in run.date],
    "state": lambda run: _STATES.index(run.state),
}


def sort_runs(runs: list[RunSummary], word: str) -> list[RunSummary]:
    """The runs by one of `SORTS`, those without a value last; runs that are equal in it by their folders."""
    if word not in SORTS:
        near = nearest(word, SORTS)
        remedy = f"Did you mean {near}?" if near else f"Write one of {', '.join(SORTS)}."
        raise UserError(f"--sort: {word!r} is not something that runs are sorted by. {remedy}")
    key = SORTS[word]
    by_folder = sorted(runs, key=lambda run: str(run.folder))
    valued = sorted((run for run in by_folder if key(run) is not None), key=key)
    return valued + [run for run in by_folder if key(run) is None]
