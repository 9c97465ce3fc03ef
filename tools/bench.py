"""lorakit against `trl sft`: the same model, rows, settings and threads, in one run. Prints ratios.

Three kinds of rows (bench_rows.py), unquantized and nf4. Both train one pass over the same pre-rendered examples (so
every trained token is the same), from the command line, each with all cores, TRL in its own order. TRL's defaults are
changed only where they change the result (float32, no dropout) or its speed to its own good (no gradient
checkpointing); the learning rate is constant in both. Another, short TRL run gets the rows in lorakit's order, so that
the losses of both can be compared step by step.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench_command import measured
from bench_rows import BATCH, DEBIAN, KINDS, SEED, recipe_settings
from bench_trl import trl_figures, trl_kind, trl_options

from lorakit.console import Terminal, result_table
from lorakit.data.batches import epoch_batches
from lorakit.prepare import Prepared, prepare_run
from lorakit.recipe.load import load

SAME = 1e-5  # how far the losses of two equal runs may differ
NF4_SHARE = 0.5  # of the steps of a kind of rows that are compared in nf4


def main() -> None:
    """Run both on each case, print the tables, and leave them as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=KINDS, nargs="+", help="kinds of rows; all, but for long ones in nf4")
    parser.add_argument("--quantization", choices=["none", "nf4"], nargs="+", default=["none", "nf4"])
    parser.add_argument("--steps", type=int, help="optimizer steps of 8 rows, instead of those of each kind")
    parser.add_argument("--kind", choices=["lora", "dora"], default="lora", help="the adapter kind of both")
    parser.add_argument("--json", type=Path, help="also write the figures here, after each case")
    options = parser.parse_args()
    found = {}
    for quantization in options.quantization:
        for rows in options.rows or [name for name in KINDS if (name, quantization) != ("long", "nf4")]:
            with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as name:
                case = Case(rows, quantization, options.kind, Path(name))
                figures = found[f"{rows}, {quantization}"] = compare(case, options.steps or case.steps)
            show(f"{rows}, {quantization}", figures)
            if options.json:
                options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, figures in found.items():
        print(
            f"{name}: {figures['speed_ratio']:.2f} times the trained tokens a second, "
            f"{figures['memory_ratio']:.2f} of the memory"
        )


class Case(NamedTuple):
    """What is compared: a kind of rows, a quantization, an adapter kind, and where to work."""

    rows: str
    quantization: str
    adapter: str
    work: Path

    @property
    def steps(self) -> int:
        """The steps that are compared unless --steps says otherwise."""
        steps = KINDS[self.rows].steps
        return steps if self.quantization == "none" else max(2, round(NF4_SHARE * steps))


def compare(case: Case, steps: int) -> dict[str, Any]:
    """Train `steps` steps with both, and a few more with TRL in lorakit's order."""
    kind, work = KINDS[case.rows], case.work
    settings = recipe_settings(case.rows, steps, work, adapter=case.adapter)
    settings += [f"model.quantization={case.quantization}"]
    prepared = prepare_run(load(DEBIAN, settings).recipe, Terminal(quiet=True))
    options = trl_kind(case.adapter, case.quantization)
    lengths = prepared.train.lengths()
    order = [row for batch in epoch_batches(lengths, BATCH, SEED, 0) for row in batch]
    first = run_lorakit(DEBIAN, settings, work / "first")
    if kind.ordered_steps:
        theirs = run_trl(prepared, range(len(lengths)), steps, options, work / "trl", "random", at_once=kind.at_once)
    ordered_steps = min(steps, kind.ordered_steps or steps)
    ordered = run_trl(prepared, order, ordered_steps, options, work / "ordered", "sequential", at_once=kind.at_once)
    theirs = theirs if kind.ordered_steps else ordered
    again = run_lorakit(DEBIAN, settings, work / "again")
    ours = mean_of(first, again)
    trained = prepared.train.report.trained_tokens
    pairs = list(zip(ours["losses"], ordered["losses"], strict=False))
    return {
        "rows": len(lengths),
        "tokens": [int(lengths.min()), int(lengths.max())],
        "steps": steps,
        "trained_tokens": trained,
        "threads": os.cpu_count(),
        "lorakit": ours | {"trained_tokens_per_second": trained / ours["seconds"]},
        "trl": theirs | {"trained_tokens_per_second": trained / theirs["seconds"]},
        "speed_ratio": theirs["seconds"] / ours["seconds"],
        "step_ratio": theirs["median_step"] / ours["median_step"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "same_order": {"lorakit": [a for a, _ in pairs], "trl": [b for _, b in pairs]},
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
    }


def mean_of(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two runs of lorakit, before and after TRL's: the machine's speed drifts, and their losses must be the same."""
    if max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)) > SAME:
        raise SystemExit("two runs of lorakit with one seed gave different losses")
    return {name: value if name == "losses" else (value + other[name]) / 2 for name, value in one.items()}


def run_lorakit(recipe: Path, settings: list[str], folder: Path, devices: int = 1) -> dict[str, Any]:
    """One `lorakit train`: seconds in the training loop and of the whole command, peak memory, each step's loss."""
    command = [sys.executable, "-m", "lorakit", "train", str(recipe), "--json", "--quiet", "-o", str(folder)]
    command += ["--devices", str(devices)] if devices > 1 else []
    for setting in settings:
        command += ["--set", setting]
    log = folder / "log.jsonl"
    done = measured(command, processes=devices, printed_a_step='"loss"', log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    outcome = json.loads(done.out)
    return {
        "seconds": outcome["seconds"],
        "seconds_a_step": outcome["seconds_a_step"],
        "median_step": done.median_step,
        **{name: outcome[name] for name in ("reduced_bytes", "reduction_seconds") if devices > 1},
        "wall_seconds": done.wall,
        "peak_bytes": done.peak,
        "losses": [line["loss"] for line in lines if "loss" in line],
    }


def run_trl(
    prepared: Prepared,
    order: Any,
    steps: int,
    options: list[str],
    folder: Path,
    sampling: str,
    devices: int = 1,
    at_once: int = BATCH,
) -> dict[str, Any]:
    """One `trl sft` on the same examples, already rendered and masked; on several devices its script under torchrun,
    since `accelerate launch --cpu`, which `trl sft` starts with, runs one process however many it is asked for.
    `options`: further ones; `at_once`: the rows of a micro-batch."""
    examples = [prepared.train.rows[index] for index in order][: steps * BATCH]
    micro_batch = min(at_once, BATCH // devices)
    if devices > 1:
        package = importlib.util.find_spec("trl")
        assert package and package.origin
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(devices)]
        command = [*torchrun, str(Path(package.origin).parent / "scripts" / "sft.py")]
    else:
        command = [shutil.which("trl", path=str(Path(sys.executable).parent)) or "trl", "sft"]
    command += [*trl_options(prepared, examples, steps, micro_batch, folder), *options]
    command += ["--gradient_accumulation_steps", str(BATCH // devices // micro_batch)]
    command += ["--dtype", "float32", "--use_cpu", "--bf16", "False"]
    command += ["--gradient_checkpointing", "False", "--train_sampling_strategy", sampling, "--max_length", "4096"]
    done = measured(command, processes=devices, printed_a_step="'loss'")
    return {
        **trl_figures(done.out),
        "median_step": done.median_step,
        "wall_seconds": done.wall,
        "peak_bytes": done.peak,
    }


def show(name: str, figures: dict[str, Any]) -> None:
    """The table and the ratios."""
    rows = []
    for who in ("lorakit", "trl"):
        one = figures[who]
        rows.append(
            [
                {"trl": "trl sft"}.get(who, who),
                f"{one['trained_tokens_per_second']:.1f}",
                f"{one['seconds']:.1f}",
                f"{one['median_step']:.1f}",
                f"{one['wall_seconds']:.1f}",
                f"{one['peak_bytes'] / 1e9:.2f}",
            ]
        )
    columns = ["", "trained tokens/s", "loop s", "median step s", "command s", "peak GB"]
    low, high = figures["tokens"]
    title = f"{name}: {figures['steps']} steps of {BATCH} rows of {low} to {high} tokens"
    result_table(f"{title}, {figures['trained_tokens']:,} trained tokens", columns, rows)
    print(f"speed: lorakit trains {figures['speed_ratio']:.2f} times the tokens a second of trl sft")
    print(f"median step: {figures['step_ratio']:.2f} times as fast")
    print(f"memory: lorakit's peak is {figures['memory_ratio']:.2f} of trl sft's")
    print(
        f"losses, same rows in the same order, largest difference of a step: {figures['largest_loss_difference']:.2g}"
    )
    for who in ("lorakit", "trl"):
        print(f"  {who:8}", "  ".join(f"{loss:.4f}" for loss in figures["same_order"][who]))
    print(flush=True)


if __name__ == "__main__":
    main()
