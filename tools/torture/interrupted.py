"""What every interrupted command must leave: nothing half under a final name, and a way to the same end."""

import json
import random
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tools.torture.cases import BrokenPromiseError
from tools.torture.command import Ended
from tools.torture.stage import (
    AGAIN,
    EVAL,
    MERGE,
    MERGE_AGAIN,
    RESUME,
    RUN,
    TRAIN,
    Stage,
    check_clean_end,
    check_same,
    check_scores,
    copy_task,
    files_of,
    new_task,
    run_in,
)

COMMANDS = {
    "train": TRAIN,
    "resume": RESUME,
    "overwrite": AGAIN,
    "merge": MERGE,
    "merge again": MERGE_AGAIN,
    "eval": EVAL,
}
_OF_THE_MOMENT = ("README.md", "merge.json")


def set_out(stage: Stage, scenario: str, place: Path) -> Path:
    """The folder in which a scenario's command is going to be interrupted."""
    if scenario in ("train", "resume"):
        return new_task(place, stage.base)
    return copy_task(stage.merged if scenario == "merge again" else stage.trained, place)


def check_whole(task: Path, stage: Stage) -> None:
    """Whatever stands under its final name is complete.

    Raises:
        BrokenPromiseError: something is half written.
    """
    run, cache = task / RUN, task / "cache"
    if (run / "adapter").exists():
        check_same(run / "adapter", stage.trained / RUN / "adapter", "the adapter", _OF_THE_MOMENT)
    if (run / "merged").exists():
        check_same(run / "merged", stage.merged / RUN / "merged", "the merged model", _OF_THE_MOMENT)
    names = set(files_of(next((stage.trained / RUN / "checkpoints").glob("step-*"))))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if set(files_of(checkpoint)) != names:
            raise BrokenPromiseError(f"{checkpoint.name} lacks or has too many: {names ^ set(files_of(checkpoint))}")
    cached = set(files_of(_examples(stage.trained / "cache")[0]))
    for examples in _examples(cache):
        if set(files_of(examples)) != cached:
            raise BrokenPromiseError(f"{examples.name} in the cache lacks files")
    for path in [*run.rglob("*"), *cache.rglob("*")]:
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(task).parts):
            _check_readable(path)


def _examples(cache: Path) -> list[Path]:
    return [path for path in sorted((cache / "examples").glob("*")) if path.is_dir() and not path.name.startswith(".")]


def _check_readable(path: Path) -> None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (it is no mapping)
                    weights.get_tensor(name)
        elif path.suffix in (".pt", ".pth", ".npz"):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a damaged member")
        elif path.suffix == ".jsonl" and path.parent.name == "eval":
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)
    except Exception as error:
        raise BrokenPromiseError(f"{path.name} is half written: {error}") from error


def finish(task: Path, stage: Stage, scenario: str) -> str:
    """Give the command that goes on, and compare what it makes with an undisturbed one.

    Raises:
        BrokenPromiseError: it does not end, or in something else.
    """
    run = task / RUN
    began = (run / "manifest.json").is_file()
    over = began and json.loads((run / "manifest.json").read_text(encoding="utf-8"))["status"] == "complete"
    goes_on = RESUME if began else TRAIN
    how = {"train": goes_on, "resume": goes_on, "merge": MERGE_AGAIN}.get(scenario, COMMANDS[scenario])
    if not (over and how is RESUME):
        check_clean_end(run_in(task, how), (0,))
    check_same(run / "adapter", stage.trained / RUN / "adapter", "the adapter", _OF_THE_MOMENT)
    if scenario.startswith("merge"):
        check_same(run / "merged", stage.merged / RUN / "merged", "the merged model", _OF_THE_MOMENT)
    if scenario == "eval":
        check_scores(run / "eval", stage.scored / RUN / "eval")
    if over and how is RESUME:
        return "had ended, byte-equal"
    _check_tidy(task)
    return "resumed byte-equal" if how is RESUME else "repeated byte-equal"


def _check_tidy(task: Path) -> None:
    """Nothing of the interrupted attempt is left, but for drafts of scores: another evaluation may be writing them."""
    drafts = (path for path in task.rglob("*") if re.search(r"^\.(lorakit-draft\.|.*\.\d+$)", path.name))
    left = [str(path.relative_to(task)) for path in drafts if path.parent.name != "eval"]
    if left:
        raise BrokenPromiseError(f"left behind: {', '.join(left)}")


def order(operations: dict[str, Sequence[str]], seed: int) -> list[tuple[str, int]]:
    """Every file operation of the commands as (command, number), those that change something new first."""
    first: list[tuple[str, int]] = []
    again: list[tuple[str, int]] = []
    for command, lines in operations.items():
        before = ""
        for line in lines:
            number, _, what = line.partition(" ")
            what = re.sub(r"\.lorakit-draft\.\S*?\.\w{8}(?=/|$)", "draft", what)
            (again if what == before else first).append((command, int(number)))
            before = what
    chance = random.Random(seed)
    chance.shuffle(first)
    chance.shuffle(again)
    return first + again


def met(ended: Ended) -> str:
    """The last file operation of a command."""
    return ended.operations[-1] if ended.operations else "no operation"


def case_of(place: Path, **facts: Any) -> None:
    """Write down what a case does, for whoever looks at its folder."""
    (place / "case.json").write_text(json.dumps(facts, default=str, indent=1), encoding="utf-8")
