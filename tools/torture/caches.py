"""Cached examples, losses and answers that are damaged: the result is that of a fresh cache, or the command says why
not."""

import random
from pathlib import Path

from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.command import Trap
from tools.torture.damage import damage
from tools.torture.interrupted import case_of
from tools.torture.stage import (
    AGAIN,
    EVAL,
    RUN,
    Stage,
    check_clean_end,
    check_same,
    check_scores,
    copy_task,
    run_in,
    set_stage,
)

_KINDS = ("examples", "losses", "answers")


def _prepare(folder: Path) -> Stage:
    return set_stage(folder)


def _run(stage: Stage, chance: random.Random, place: Path, number: int) -> str:
    task = copy_task(stage.scored, place)
    command = chance.choice([AGAIN, EVAL])
    run_in(task, command, Trap(task))  # what is cached under this task's own paths
    kinds = ("examples",) if command is AGAIN else _KINDS
    folders = [task / "cache" / kind for kind in kinds if (task / "cache" / kind).is_dir()]
    done = damage(chance, chance.choice(folders), values=chance.random() < 0.3, pipes=False)
    case_of(place, command=command, damage=done)
    ended = run_in(task, command, seconds=90)
    try:
        check_clean_end(ended, (0, 1, 2))
        if ended.code == 0:
            check_same(task / RUN / "adapter", stage.trained / RUN / "adapter", "the adapter", ("README.md",))
            if command is EVAL:
                check_scores(task / RUN / "eval", stage.scored / RUN / "eval")
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"{command[0]}, {'; '.join(done)}: {error}") from error
    return {0: "the same result", 1: "failed with a message", 2: "refused"}[ended.code]


PART = Part("caches", 60, _prepare, _run, seconds=200)
