"""Run folders whose files are damaged: an interrupted run resumes to the same bytes, or is refused; a finished one is
scored and merged as it stands, or refused."""

import random
from pathlib import Path

from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.command import Trap
from tools.torture.damage import damage
from tools.torture.interrupted import case_of
from tools.torture.stage import (
    EVAL,
    MERGE,
    RESUME,
    RUN,
    TRAIN,
    Stage,
    check_clean_end,
    check_same,
    copy_task,
    new_task,
    run_in,
    set_stage,
)


def _prepare(folder: Path) -> tuple[Stage, Path]:
    """A stage, and a task whose run was killed after its second checkpoint."""
    stage = set_stage(folder)
    lines = stage.operations["train"]
    at = max(at for at, line in enumerate(lines, start=1) if line.endswith("checkpoints/step-000002"))
    halfway = new_task(folder / "halfway", stage.base)
    run_in(halfway, TRAIN, Trap(halfway, at=at + 8))
    return stage, halfway


def _run(shared: tuple[Stage, Path], chance: random.Random, place: Path, number: int) -> str:
    stage, halfway = shared
    command = chance.choice([RESUME, RESUME, EVAL, MERGE])
    task = copy_task(halfway if command is RESUME else stage.trained, place)
    done = damage(chance, task / RUN, chance.choice([None, ["manifest.json", "recipe.yaml", "log.jsonl"]]))
    case_of(place, command=command, damage=done)
    ended = run_in(task, command, seconds=90)
    try:
        check_clean_end(ended, (0, 2))
        if command is RESUME and ended.code == 0:
            adapter = stage.trained / RUN / "adapter"
            check_same(task / RUN / "adapter", adapter, "the adapter", ("README.md", "adapter_config.json"))
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"{command[0]}, {'; '.join(done)}: {error}") from error
    return {0: "byte-equal" if command is RESUME else "used", 2: "refused"}[ended.code]


PART = Part("runs", 120, _prepare, _run, seconds=200)
