"""A finished run, its merge and its evaluation: what damaged and interrupted ones are compared with."""

import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.torture.cases import BrokenPromiseError
from tools.torture.command import Ended, Trap, call_in_fork, import_all_of, run_command
from tools.torture.workshop import make_base, write_recipe

RUN = "runs/tiny"
TRAIN = ("train", "recipe.yaml", "--quiet")
RESUME = (*TRAIN, "--resume")
AGAIN = (*TRAIN, "--overwrite")
MERGE = ("merge", RUN, "--quiet")
MERGE_AGAIN = (*MERGE, "--overwrite")
EVAL = ("eval", RUN, "--quiet")


@dataclass(frozen=True)
class Stage:
    """Tasks' folders in which nothing was disturbed: one with a finished run, one whose run is merged too, one whose
    run is scored too. `operations` and `seconds` of each command of the three."""

    base: Path
    trained: Path
    merged: Path
    scored: Path
    operations: dict[str, tuple[str, ...]]
    seconds: dict[str, float]


def set_stage(folder: Path) -> Stage:
    """Make the base, import what the commands import, and run the three once."""
    base = folder / "base"
    call_in_fork(lambda: _make(base))
    first = new_task(folder / "first", base)
    import_all_of([(command, first, first / "cache") for command in (TRAIN, MERGE, EVAL)], folder / "names.txt")
    trained = new_task(folder / "trained", base)
    operations, seconds = {}, {}

    def undisturbed(command: tuple[str, ...], task: Path) -> Path:
        began = time.monotonic()
        ended = run_in(task, command, Trap(task))
        if ended.code:
            raise RuntimeError(f"lorakit {' '.join(command)}: {ended.text}")
        operations[command[0]], seconds[command[0]] = ended.operations, time.monotonic() - began
        return task

    undisturbed(TRAIN, trained)
    merged = undisturbed(MERGE, copy_task(trained, folder / "merged"))
    scored = undisturbed(EVAL, copy_task(trained, folder / "scored"))
    return Stage(base, trained, merged, scored, operations, seconds)


def _make(base: Path) -> None:
    make_base(base)


def new_task(place: Path, base: Path, **sections: dict[str, Any]) -> Path:
    """A folder with a recipe, its rows and its base, below which a command's file operations are counted."""
    task = place / "task"
    write_recipe(task, Path("base"), **sections)
    shutil.copytree(base, task / "base")
    return task


def copy_task(task: Path, place: Path) -> Path:
    """The same task in another place."""
    shutil.copytree(task, place / "task", symlinks=True)
    return place / "task"


def run_in(task: Path, command: tuple[object, ...], trap: Trap | None = None, **options: Any) -> Ended:
    """A command in a task's folder, what it prints beside it."""
    return run_command(command, task, task / "cache", trap, beside=task.parent, **options)


def check_clean_end(ended: Ended, codes: tuple[int, ...]) -> None:
    """One of these exit codes, with a message of ours where it is not 0, and no traceback.

    Raises:
        BrokenPromiseError: it ended otherwise.
    """
    last = ended.text.strip()[-1500:]
    if "Traceback (most recent call last)" in ended.text or "fault in lorakit" in ended.text:
        raise BrokenPromiseError(f"exit code {ended.code}: {last}")
    if ended.code not in codes:
        raise BrokenPromiseError(f"exit code {ended.code}, not {' or '.join(map(str, codes))}: {last}")
    if ended.code in (1, 2) and not last:
        raise BrokenPromiseError(f"exit code {ended.code} without a message: {last}")


def files_of(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """The sha256 of every file below a folder by its path there; the path of its task is left out of what it says."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): hashlib.sha256(_placeless(path)).hexdigest() for path in files}


def _placeless(path: Path) -> bytes:
    return re.sub(rb'/[^"\s]*/task(?=[/"])', b"", path.read_bytes())


def check_same(found: Path, expected: Path, what: str, but: tuple[str, ...] = ()) -> None:
    """Two folders hold the same files, byte for byte.

    Raises:
        BrokenPromiseError: they do not.
    """
    mine, theirs = files_of(found, but), files_of(expected, but)
    if mine != theirs:
        differ = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        raise BrokenPromiseError(f"{what} is not that of an undisturbed one: {', '.join(differ)}")


def check_scores(found: Path, expected: Path) -> None:
    """The newest evaluation of a run says the same figures and answers.

    Raises:
        BrokenPromiseError: it does not.
    """
    mine, theirs = (_scores(folder) for folder in (found, expected))
    if mine != theirs:
        raise BrokenPromiseError(f"other scores than of an undisturbed evaluation: {_first_difference(mine, theirs)}")


_OF_THE_MOMENT = {"taken", "notes", "answers"}


def _scores(folder: Path) -> Any:
    newest = max(folder.glob("*.json"))
    facts = _lasting(json.loads(_placeless(newest)))
    answers = _placeless(newest.with_suffix(".jsonl")).decode()
    return json.dumps(facts, sort_keys=True), answers


def _first_difference(mine: tuple[str, str], theirs: tuple[str, str]) -> str:
    for one, other in zip(mine, theirs, strict=True):
        at = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))
        if one != other:
            return f"{one[max(0, at - 100) : at + 100]!r}, not {other[max(0, at - 100) : at + 100]!r}"
    return ""


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in _OF_THE_MOMENT}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value
