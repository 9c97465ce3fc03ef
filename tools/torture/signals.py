"""Ctrl-C, SIGTERM and SIGHUP at any moment of a training, a merge and an evaluation, some of them twice."""

import json
import random
import signal
from pathlib import Path

from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.interrupted import COMMANDS, case_of, check_whole, finish, set_out
from tools.torture.stage import RUN, Stage, check_clean_end, run_in, set_stage

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_START = 0.2
"""Seconds in which the forked process becomes a lorakit of its own."""


def _prepare(folder: Path) -> Stage:
    return set_stage(folder)


def _run(stage: Stage, chance: random.Random, place: Path, number: int) -> str:
    scenario = chance.choice(["train"] * 6 + ["resume", "overwrite", "merge", "eval"])
    kind = _SIGNALS[number % 3]
    command = {"merge": "merge", "eval": "eval"}.get(scenario, "train")
    when = _START + chance.random() * max(stage.seconds[command], 0.3)
    signals = [(when, kind)]
    if chance.random() < 0.25:
        signals.append((when + chance.random() * 0.5, chance.choice(_SIGNALS)))
    case_of(place, scenario=scenario, signals=signals)
    task = set_out(stage, scenario, place)
    if scenario == "resume":
        run_in(task, COMMANDS["train"], signals=[(_START + chance.random() * stage.seconds["train"], signal.SIGINT)])
        scenario = _next(task)
    ended = run_in(task, COMMANDS[scenario], signals=signals)
    names = " and ".join(f"{signal.Signals(sent).name} after {at:.2f} s" for at, sent in signals)
    try:
        check_clean_end(ended, (0, 130))
        check_whole(task, stage)
        if ended.code and len(signals) == 1 and command == "train":
            _check_kept(task)
        return ("" if ended.code else "not met, ") + finish(task, stage, scenario)
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"{scenario}, {names}: {error}") from error


def _next(task: Path) -> str:
    """The command that goes on with a run, wherever it was interrupted."""
    manifest = task / RUN / "manifest.json"
    if not manifest.is_file():
        return "train"
    ended = json.loads(manifest.read_text(encoding="utf-8"))["status"] == "complete"
    return "overwrite" if ended else "resume"


def _check_kept(task: Path) -> None:
    """The last step that was trained has its checkpoint."""
    log = task / RUN / "log.jsonl"
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    kept = [int(path.name[-6:]) for path in (task / RUN / "checkpoints").glob("step-*")]
    if steps and max(steps) not in kept:
        raise BrokenPromiseError(f"step {max(steps)} was trained, the checkpoints are of {sorted(kept)}")


PART = Part("signals", 40, _prepare, _run, seconds=300)
