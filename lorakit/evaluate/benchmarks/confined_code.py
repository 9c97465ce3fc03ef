"""The Python that a model wrote, run in a confined process for each program, and lm-eval's metric for it."""

import importlib.util
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorakit.errors import UserError
from lorakit.hardware.threads import usable_processors

METRIC = "code_eval"
"""The metric of the hub in whose place `ConfinedCode` is."""
SECONDS = 3.0
"""For each program, as in that metric."""
_START_SECONDS = 60.0
_ENVIRONMENT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL")  # what Python may need to start; no secret of the user's
_PROGRAM = Path(__file__).with_name("confined_program.py")
Outcome = Literal["passed", "failed", "timed out"]


def check_confinement() -> None:
    """An error where this machine cannot confine a program."""
    if importlib.util.find_spec("seccompy") is not None:
        import seccompy

        if seccompy.supported() and run_confined("assert True") == "passed":
            return
    raise UserError(
        "--allow-code: the code that models write is confined by the kernel's system call filter (seccomp), which this "
        "machine lacks. Run this on Linux (x86_64 or aarch64), with pip install 'lorakit[tasks]'."
    )


def run_confined(code: str, seconds: float = SECONDS) -> Outcome:
    """Run a program without network, without writing files, and within limits of time and memory. It passes if it comes
    to its end without an exception; exiting is not coming to its end."""
    password = secrets.token_hex(16).encode()
    reading, writing = os.pipe()
    command = [sys.executable, "-I", str(_PROGRAM), str(writing), str(int(seconds) + 1)]
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    alone: Any = {**quiet, "pass_fds": [writing], "env": environment, "start_new_session": True}
    try:
        with subprocess.Popen(command, cwd="/", **alone) as process:
            os.close(writing)
            try:
                assert process.stdin is not None
                process.stdin.write(password + b"\n" + code.encode("utf-8", "replace"))
                process.stdin.close()
                if not _read(reading, 1, _START_SECONDS):
                    return "failed"
                answer = _read(reading, len(password), seconds)
                if answer is None:
                    return "timed out"
                return "passed" if answer == password else "failed"
            except BrokenPipeError:
                return "failed"
            finally:
                process.kill()
    finally:
        os.close(reading)


def _read(descriptor: int, size: int, seconds: float) -> bytes | None:
    """The first `size` bytes, fewer if the other end closes before; None if neither happens in time."""
    end, text = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(text) < size:
            if not selector.select(max(0.0, end - time.monotonic())):
                return None
            part = os.read(descriptor, size - len(text))
            if not part:
                break
            text += part
    return text


class ConfinedCode:
    """The interface of the hub's metric `code_eval`, which runs programs unconfined."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        timeout: float = SECONDS,
        **_: Any,
    ) -> tuple[dict[str, float], Mapping[int, Any]]:
        """The share of problems solved by one of k answers, `pass@k` as Chen et al. (2021, arXiv:2107.03374) estimate
        it, and each answer's outcome. `references`: the tests of each problem; `predictions`: its programs."""
        programs = [
            (problem, f"{program}\n{tests}")
            for problem, (programs, tests) in enumerate(zip(predictions, references, strict=True))
            for program in programs
        ]
        with ThreadPoolExecutor(max_workers=usable_processors()) as pool:
            outcomes = list(pool.map(lambda each: run_confined(each[1], timeout), programs))
        results: dict[int, list[Any]] = {problem: [] for problem in range(len(references))}
        for (problem, _program), outcome in zip(programs, outcomes, strict=True):
            done = {"task_id": problem, "passed": outcome == "passed", "result": outcome}
            results[problem].append((len(results[problem]), done | {"completion_id": len(results[problem])}))
        counts = [(len(each), sum(one["passed"] for _, one in each)) for each in results.values()]
        least = min((total for total, _ in counts), default=0)
        return {
            f"pass@{n}": float(np.mean([_pass_at(n, *count) for count in counts])) for n in k if n <= least
        }, results


def _pass_at(k: int, total: int, right: int) -> float:
    """The chance that one of k answers, drawn from `total` of which some are right, is right."""
    if total - right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(total - right + 1, total + 1)))
