"""Kills at the n-th file operation of a training, a merge and an evaluation, every one of them in turn."""

import random
from pathlib import Path

from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.command import Trap
from tools.torture.interrupted import COMMANDS, case_of, check_whole, finish, met, order, set_out
from tools.torture.stage import Stage, run_in, set_stage

_SEED = 1
"""Of the order in which the operations are met: the case's number alone tells which one."""


def _prepare(folder: Path) -> Stage:
    return set_stage(folder)


def _run(stage: Stage, chance: random.Random, place: Path, number: int) -> str:
    targets = order(dict(stage.operations), _SEED)
    scenario, at = targets[(number - 1) % len(targets)]
    if number % 6 == 0:
        scenario = {"train": chance.choice(["resume", "overwrite"]), "merge": "merge again"}.get(scenario, scenario)
    half = chance.random() < 0.5
    case_of(place, scenario=scenario, at=at, half=half)
    task = set_out(stage, scenario, place)
    if scenario == "resume":  # what is resumed was killed itself
        before = chance.randrange(at // 2, at + 1)
        run_in(task, COMMANDS["train"], Trap(task, at=before or 1))
        at = chance.randrange(1, 250)
        scenario = "train" if not (task / "runs/tiny/manifest.json").is_file() else scenario
    ended = run_in(task, COMMANDS[scenario], Trap(task, at=at, half=half))
    where = f"{scenario} killed at operation {at} ({met(ended)}): "
    if ended.code not in (-9, 0):
        raise BrokenPromiseError(f"{where}exit code {ended.code}: {ended.text[-1500:]}")
    try:
        check_whole(task, stage)
        return ("" if ended.code else "not met, ") + finish(task, stage, scenario)
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"{where}{error}") from error


PART = Part("kills", 240, _prepare, _run, seconds=300)
