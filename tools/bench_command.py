"""A command, run and watched: what it printed, how long it took, the memory of its largest process, its steps."""

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Done(NamedTuple):
    """A command that has ended: its standard output, wall seconds, the peak resident memory of its largest process in
    bytes, and when each of its steps was seen to be logged."""

    out: str
    wall: float
    peak: int
    steps: list[float]

    @property
    def median_step(self) -> float:
        """The median seconds from one step to the next, to a tenth of a second; not a number with fewer than two."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return statistics.median([after - before for before, after in pairs] or [float("nan")])


def measured(
    command: list[str],
    limit: float | None = None,
    processes: int = 1,
    printed_a_step: str = "",
    log: Path | None = None,
) -> Done:
    """Run a command whose `processes` share the cores. `printed_a_step`: what `log`, or its standard output, says once
    a step. After `limit` seconds it is ended, which counts as a failure."""
    threads = str((os.cpu_count() or 1) // processes)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "MKL_NUM_THREADS": threads}
    environment |= {"PYTHONUNBUFFERED": "1"}
    begin, peak, steps = time.monotonic(), 0, []
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        while process.poll() is None:
            peak = max(peak, largest_resident(process.pid))
            steps += [time.monotonic()] * (count_in(log or Path(out.name), printed_a_step) - len(steps))
            time.sleep(0.1)
            if limit is not None and time.monotonic() - begin > limit:
                process.kill()
                raise SystemExit(f"{' '.join(command[:4])}: ended after {limit:.0f} s")
        wall = time.monotonic() - begin
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:3])} failed:\n{out.read()[-2000:]}\n{err.read()[-3000:]}")
        return Done(out.read(), wall, peak, steps)


def count_in(file: Path, text: str) -> int:
    """How often a file has a text; none of an empty one."""
    return file.read_text(encoding="utf-8", errors="replace").count(text) if text and file.is_file() else 0


def largest_resident(pid: int) -> int:
    """The resident bytes of the largest process in a tree."""
    import psutil

    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return max(process.memory_info().rss for process in tree)
    except psutil.Error:
        return 0
