"""The parts of tools/gpu.py: each has its own time limit, and is recorded as it ends, whatever becomes of it."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_command import Done, measured

from lorakit.atomic_io import write_atomic
from lorakit.errors import LorakitError

FAILURES = (SystemExit, LorakitError, OSError, subprocess.SubprocessError, ValueError, LookupError, RuntimeError)
LEAST = 10  # seconds: with less left no part begins


class Skipped(Exception):
    """A part that cannot be run here, and is no failure."""


@dataclass
class Bench:
    """Where the parts work, and what they found so far."""

    out: Path
    tiny: bool
    deadline: float
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: Callable[[dict[str, dict[str, Any]]], str] = str
    part_deadline: float = float("inf")

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def steps(self) -> int:
        return 3 if self.tiny else 20

    @property
    def warm_steps(self) -> int:
        """The first steps, which do not count for the speed."""
        return 1 if self.tiny else 5

    def left(self) -> float:
        """Seconds until the time of this part, or of all, is up."""
        return min(self.deadline, self.part_deadline) - time.monotonic()

    def write(self) -> None:
        """Keep what is known: the figures, and a page to read."""
        write_atomic(self.out / "results.json", json.dumps(self.results, indent=2) + "\n")
        write_atomic(self.out / "summary.md", self.summary(self.results))

    def run(self, command: list[str]) -> Done:
        """A command, which is ended when the time is up. Tiny models gain nothing from more than one thread."""
        return measured(command, self.left(), processes=(os.cpu_count() or 1) if self.tiny else 1)


def run_part(bench: Bench, name: str, part: Callable[[Bench], dict[str, Any]], limit: float = float("inf")) -> None:
    """One part within `limit` seconds, whatever becomes of it."""
    begin = time.monotonic()
    bench.part_deadline = begin + limit
    print(f"== {name} ({bench.deadline - begin:.0f} s left)", flush=True)
    if bench.left() < LEAST:
        found = {"state": "no time left"}
    else:
        try:
            found = {"state": "done", **part(bench)}
        except Skipped as reason:
            found = {"state": "skipped", "reason": str(reason)}
        except FAILURES as error:
            found = {"state": "failed", "error": str(error)[-6000:] or type(error).__name__}
            print(found["error"], flush=True)
    bench.results[name] = {**found, "took": round(time.monotonic() - begin, 1)}
    bench.write()
