"""Commands in several processes, for tests: started by lorakit or by a launcher, watched and killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed_runs import train_on

from lorakit.run_dir import Run

_SECONDS = 120
STEPS = 150
# Long enough to be met in the middle, with a checkpoint every few steps.
TRAIN = {"epochs": None, "steps": STEPS, "learning_rate": 1e-3, "save_every": 5, "eval_every": 75, "keep": 1000}


def lorakit_train(path: Path, folder: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "lorakit", "train", str(path), "-o", str(folder), *map(str, arguments)]


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A command and what it prints; it does not outlive the test."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end_of(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output, the words of standard error."""
    out, err = process.communicate(timeout=_SECONDS)
    return process.returncode, out, " ".join(err.split())


def wait_for(happened: Callable[[], Any], process: subprocess.Popen) -> None:
    end = time.monotonic() + _SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def processes_of(process: subprocess.Popen) -> dict[int, int]:
    """The process ids of a command's processes by rank, of those that are there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        ranks |= {int(name.removeprefix(b"RANK=")): int(child) for name in variables if name.startswith(b"RANK=")}
    return ranks


def checkpoints(folder: Path) -> int:
    return len(Run(folder).complete_checkpoints())


def finish(path: Path, folder: Path) -> Run:
    """The run, to its end from where it was cut short."""
    if not Run(folder).manifest.exists():
        return train_on(2, path, folder)[0]
    return train_on(2, path, folder, resume=True)[0]
