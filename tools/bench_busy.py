"""`lorakit train` on an idle machine and beside processes that burn cores, in turns.

While `busy` of the cores are burnt, that share of the time is lost to a process that needs all cores. The figure is the
trained tokens a second beside them over those on the idle machine; it should be at least (1 - share lost) x 0.7.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import run_lorakit
from bench_rows import BATCH, DEBIAN, KINDS, recipe_settings

from lorakit.console import result_table

OF_THE_REST = 0.7  # of the time that is left: what should become of it at least


def main() -> None:
    """Measure, print the table, and leave it as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=KINDS, default="debian-json")
    parser.add_argument("--busy", type=int, default=1, help="cores that are burnt")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps of {BATCH} rows")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="KEY=VALUE of the recipe")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorakit-busy-") as name:
        settings = [*recipe_settings(options.rows, options.steps, Path(name)), *options.settings]
        figures = compare(settings, options.busy, options.rounds, Path(name))
    show(figures, options.steps)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(settings: list[str], busy: int, rounds: int, work: Path) -> dict[str, Any]:
    """The seconds a step of so many runs of each, and the ratio of their medians."""
    idle, beside = [], []
    for turn in range(rounds):
        idle.append(run_lorakit(DEBIAN, settings, work / f"idle-{turn}"))
        with burnt(busy):
            beside.append(run_lorakit(DEBIAN, settings, work / f"busy-{turn}"))
    cores = os.cpu_count() or 1
    seconds = {
        name: [run["seconds_a_step"] for run in runs] for name, runs in (("idle", idle), (f"{busy} burnt", beside))
    }
    medians = [statistics.median(runs) for runs in seconds.values()]
    fastest = [min(runs) for runs in seconds.values()]
    return {
        "cores": cores,
        "busy": busy,
        "seconds_a_step": seconds,
        "ratio": medians[0] / medians[1],
        "ratio_of_fastest": fastest[0] / fastest[1],
        "bar": (1 - busy / cores) * OF_THE_REST,
    }


@contextmanager
def burnt(count: int) -> Iterator[None]:
    """So many processes that compute without end, while the block runs."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def show(figures: dict[str, Any], steps: int) -> None:
    """The table and the ratio."""
    rows = [
        [name, f"{statistics.median(runs):.2f}", "  ".join(f"{run:.2f}" for run in runs)]
        for name, runs in figures["seconds_a_step"].items()
    ]
    result_table(f"{steps} steps of {BATCH} rows, {figures['cores']} cores", ["", "s a step, median", "of runs"], rows)
    lost = figures["busy"] / figures["cores"]
    print(
        f"beside {figures['busy']} burnt: {figures['ratio']:.2f} of the trained tokens a second of the idle machine, "
        f"{figures['ratio_of_fastest']:.2f} by the fastest runs; at least {figures['bar']:.2f} is wanted: "
        f"(1 - {lost:.2f} lost) x {OF_THE_REST}"
    )


if __name__ == "__main__":
    main()
