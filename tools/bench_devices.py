"""One process against two with as many threads in all, and two of `trl sft` under torchrun, on the same rows.

Every training is the command that a user would type, on the model, rows and settings of tools/bench.py. One and two
processes of lorakit are run in turn, and their losses must be the same.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import run_lorakit, run_trl
from bench_rows import BATCH, DEBIAN, recipe_settings
from bench_trl import trl_kind

from lorakit.console import Terminal, result_table
from lorakit.prepare import prepare_run
from lorakit.recipe.load import load

_TOLERANCE = 1e-5


def main() -> None:
    """Run all, print the table, and leave it as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=DEBIAN)
    parser.add_argument("--steps", type=int, default=20, help=f"optimizer steps of {BATCH} rows")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--devices", type=int, default=2, help="processes, which share the cores")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as name:
        figures = compare(options.recipe, options.steps, options.rounds, options.devices, Path(name))
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(recipe: Path, steps: int, rounds: int, devices: int, work: Path) -> dict[str, Any]:
    """Medians of so many runs of each."""
    settings = recipe_settings("debian-json", steps, work, recipe)
    prepared = prepare_run(load(recipe, settings).recipe, Terminal(quiet=True))
    rows = range(len(prepared.train.rows))
    one, several, theirs = [], [], []
    for turn in range(rounds):
        one.append(run_lorakit(recipe, settings, work / f"one-{turn}"))
        several.append(run_lorakit(recipe, settings, work / f"several-{turn}", devices))
        theirs.append(run_trl(prepared, rows, steps, trl_kind("lora", "none"), work / f"trl-{turn}", "random", devices))
    apart = max(abs(a - b) for a, b in zip(one[0]["losses"], several[0]["losses"], strict=True))
    if apart > _TOLERANCE:
        raise SystemExit(f"{devices} processes gave other losses than one: {apart:.2g} apart")
    return {
        "steps": steps,
        "devices": devices,
        "threads": os.cpu_count(),
        "trained_tokens": prepared.train.report.trained_tokens,
        "largest_loss_difference": apart,
        "lorakit, 1 process": medians(one),
        f"lorakit, {devices} processes": medians(several),
        f"trl sft, {devices} processes": medians(theirs),
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each figure of several runs the median."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "losses"}


def show(figures: dict[str, Any]) -> None:
    """The table and the ratios."""
    one, several, theirs = (name for name in figures if isinstance(figures[name], dict))
    rows = []
    for name in (one, several, theirs):
        run = figures[name]
        speed = figures["trained_tokens"] / run["seconds"]
        rows.append([name, f"{speed:.1f}", f"{run['seconds']:.1f}", f"{run['wall_seconds']:.1f}"])
        rows[-1].append(f"{run['peak_bytes'] / 1e9:.2f}")
    columns = ["", "trained tokens/s", "loop s", "command s", "peak GB of a process"]
    title = f"{figures['steps']} steps of {BATCH} rows, {figures['threads']} threads in all"
    result_table(title, columns, rows)
    run = figures[several]
    share = run["reduction_seconds"] / run["seconds_a_step"]
    print(f"{several} take {run['seconds'] / figures[one]['seconds']:.2f} of the time of one")
    print(f"{several} are {figures[theirs]['seconds'] / run['seconds']:.2f} times as fast as {theirs}")
    print(
        f"a step adds up {run['reduced_bytes'] / 1e6:.1f} MB of gradients in {1000 * run['reduction_seconds']:.0f} ms, "
        f"{share:.1%} of a step of {1000 * run['seconds_a_step']:.0f} ms"
    )
    print(f"losses of one and {several}, largest difference of a step: {figures['largest_loss_difference']:.2g}")


if __name__ == "__main__":
    main()
