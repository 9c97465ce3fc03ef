"""Runs the cases of a part in forked processes that may hang, crash or eat memory without harm to the rest."""

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BATCH = 200


class BrokenPromiseError(Exception):
    """What was promised of any input did not hold for this one."""


@dataclass(frozen=True)
class Part:
    """One kind of case. `prepare` makes what all its cases share; `run` makes one case of a random generator in an
    empty folder and says in a word how it ended, or raises. `seconds` and `memory` (bytes) are the most one may take.
    """

    name: str
    count: int
    prepare: Callable[[Path], Any]
    run: Callable[[Any, random.Random, Path, int], str]
    seconds: float
    memory: int | None = None


@dataclass
class Result:
    """What became of a part's cases: how many ended in which way, and what did not hold."""

    name: str
    tried: int = 0
    seconds: float = 0.0
    ways: Counter[str] = field(default_factory=Counter)
    broken: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.tried - len(self.broken)


@dataclass
class _Worker:
    """A forked process, the cases that are left to it, and the one it is at."""

    child: int
    pipe: int
    left: list[int]
    rest: bytes = b""
    at: int | None = None
    deadline: float = 0.0


def run_part(
    part: Part,
    shared: Any,
    seed: int,
    numbers: Sequence[int],
    folder: Path,
    keep: Path,
    jobs: int,
    tell: Callable[[Result], None],
) -> Result:
    """Run the cases of these numbers; the folders of those that did not hold go to `keep`."""
    result, began = Result(part.name), time.monotonic()
    size = max(1, min(_BATCH, len(numbers) // jobs or 1))
    batches = [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    gc.collect()
    gc.freeze()  # what a fork inherits is not looked through again

    def note(number: int, why: str) -> None:
        place, kept = folder / f"{part.name}-{number}", keep / f"{part.name}-{seed}-{number}"
        if place.exists():
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place, kept, symlinks=True, ignore=_no_pipes)
            shutil.rmtree(place, ignore_errors=True)
        again = f"--only {part.name} --seed {seed} --number {number}"
        result.broken.append({"number": number, "why": why, "again": again, "kept": str(kept)})

    running: list[_Worker] = []
    while batches or running:
        while batches and len(running) < jobs:
            running.append(_start(part, shared, seed, batches.pop(0), folder))
        ready, _, _ = select.select([worker.pipe for worker in running], [], [], 0.5)
        for worker in list(running):
            ended = worker.pipe in ready and not _listen(worker, part, result, note)
            late = worker.at is not None and time.monotonic() > worker.deadline
            if late:
                os.killpg(worker.child, signal.SIGKILL)
            if ended or late:
                _, status = os.waitpid(worker.child, 0)
                os.close(worker.pipe)
                running.remove(worker)
                if worker.at is not None:
                    result.tried += 1
                    died = f"the process died: {os.waitstatus_to_exitcode(status)}"
                    note(worker.at, f"not over after {part.seconds:.0f} s" if late else died)
                if worker.left:
                    batches.insert(0, worker.left)
        result.seconds = time.monotonic() - began
        tell(result)
    return result


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_symlink() and (Path(folder) / name).is_fifo()]


def _listen(worker: _Worker, part: Part, result: Result, note: Callable[[int, str], None]) -> bool:
    """Take up what a worker says; False when it has ended."""
    data = os.read(worker.pipe, 1 << 16)
    *lines, worker.rest = (worker.rest + data).split(b"\n")
    for line in lines:
        what, number, text = json.loads(line)
        if what == "begin":
            worker.at, worker.deadline = number, time.monotonic() + part.seconds
            worker.left.remove(number)
            continue
        worker.at = None
        result.tried += 1
        if what == "held":
            result.ways[text] += 1
        else:
            note(number, text)
    return bool(data)


def _start(part: Part, shared: Any, seed: int, numbers: list[int], folder: Path) -> _Worker:
    ours, theirs = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(theirs)
        return _Worker(child, ours, list(numbers))
    try:
        os.setpgid(0, 0)
        os.close(ours)
        _limit(part.memory)
        for number in numbers:
            _run_case(part, shared, seed, number, folder, theirs)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _run_case(part: Part, shared: Any, seed: int, number: int, folder: Path, pipe: int) -> None:
    def say(what: str, text: str) -> None:
        os.write(pipe, json.dumps([what, number, text]).encode() + b"\n")

    say("begin", "")
    place = folder / f"{part.name}-{number}"
    place.mkdir(parents=True)
    os.chdir(place)
    try:
        way = part.run(shared, random.Random(f"{seed}/{part.name}/{number}"), place, number)
    except BrokenPromiseError as error:
        say("broke", str(error)[-4000:])
    except BaseException:
        say("broke", traceback.format_exc()[-4000:])
    else:
        os.chdir(folder)
        shutil.rmtree(place, ignore_errors=True)
        say("held", way)


def _limit(memory: int | None) -> None:
    """Let this process take that much memory more than it has."""
    if memory is None:
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
