"""A disk that is full, or fails, from the n-th file operation on: a message, and nothing half."""

import errno
import os
import random
from pathlib import Path
from typing import Any

from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.command import Trap
from tools.torture.interrupted import COMMANDS, case_of, check_whole, finish, order, set_out
from tools.torture.stage import Stage, check_clean_end, run_in, set_stage

_SEED = 2
_FAULTS = {errno.ENOSPC: True, errno.EDQUOT: True, errno.EFBIG: True, errno.EIO: False}
"""The system's errors, and whether each stays."""
_WORDS = {
    errno.ENOSPC: ("is full", "no space left"),
    errno.EDQUOT: ("quota", "is full"),
    errno.EFBIG: ("larger than it may be", "limit on file sizes", "file too large", "is full"),
    errno.EIO: ("failed", "input/output error", "could not be written"),
}
"""What a message about each says, one of these at least."""


def _prepare(folder: Path) -> Stage:
    return set_stage(folder)


def _run(stage: Stage, chance: random.Random, place: Path, number: int) -> str:
    targets = order(dict(stage.operations), _SEED)
    scenario, at = targets[(number - 1) % len(targets)]
    if number % 8 == 0:
        scenario = {"train": "overwrite", "merge": "merge again"}.get(scenario, scenario)
    error = chance.choice([errno.ENOSPC, *_FAULTS])
    trap: dict[str, Any] = {"at": at, "error": error, "half": chance.random() < 0.5, "lasting": _FAULTS[error]}
    case_of(place, scenario=scenario, **trap)
    task = set_out(stage, scenario, place)
    ended = run_in(task, COMMANDS[scenario], Trap(task, **trap))
    words = os.strerror(error)
    where = f"{scenario}, {words} from operation {at} ({_met(ended.operations, at)}): "
    try:
        check_clean_end(ended, (0, 1, 2))
        if ended.code and not any(said in ended.text.lower() for said in _WORDS[error]):
            raise BrokenPromiseError(f"the message does not say {words!r}: {ended.text[-1500:]}")
        check_whole(task, stage)
        return ("failed, " if ended.code else "not met, ") + finish(task, stage, scenario)
    except BrokenPromiseError as broken:
        raise BrokenPromiseError(f"{where}{broken}") from broken


def _met(operations: tuple[str, ...], at: int) -> str:
    return operations[at - 1] if at <= len(operations) else "none"


PART = Part("disks", 60, _prepare, _run, seconds=300)
