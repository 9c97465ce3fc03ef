"""lorakit against `trl sft`: the same model, rows, settings and threads, in one run. Prints ratios.

Both train one pass over the same pre-rendered examples (so every trained token is the same), from the command line,
each with all cores, TRL in its own order. TRL's defaults are changed only where they change the result (float32, no
dropout) or its speed to its own good (no gradient checkpointing); the learning rate is constant in both. Another, short
TRL run gets the rows in lorakit's order, so that the losses of both can be compared step by step.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trl

from lorakit.console import Terminal, result_table
from lorakit.data.batches import epoch_batches
from lorakit.prepare import Prepared, prepare_run
from lorakit.recipe.load import load

ROOT = Path(__file__).resolve().parent.parent
RATE, SEED, BATCH = 1e-3, 42, 8
ORDERED_STEPS = 6


def main() -> None:
    """Run both, print the table, and leave it as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/debian-json/recipe.yaml")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 8 rows")
    parser.add_argument("--kind", choices=["lora", "dora"], default="lora", help="the adapter kind of both")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as name:
        figures = compare(options.recipe, options.steps, options.kind, Path(name))
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(recipe: Path, steps: int, kind: str, work: Path) -> dict[str, Any]:
    """Train `steps` steps with both, and a few more with TRL in lorakit's order."""
    settings = bench_settings(recipe, steps, kind, work)
    prepared = prepare_run(load(recipe, settings).recipe, Terminal(quiet=True))
    first = run_lorakit(recipe, settings, work / "first")
    theirs = run_trl(prepared, range(len(prepared.train.rows)), steps, kind, work / "trl", "random")
    again = run_lorakit(recipe, settings, work / "again")
    ours = mean_of(first, again)
    lengths = prepared.train.lengths()
    order = [row for batch in epoch_batches(lengths, BATCH, SEED, 0) for row in batch]
    ordered = run_trl(prepared, order, ORDERED_STEPS, kind, work / "ordered", "sequential")
    trained = prepared.train.report.trained_tokens
    pairs = list(zip(ours["losses"], ordered["losses"], strict=False))
    return {
        "rows": len(lengths),
        "steps": steps,
        "trained_tokens": trained,
        "threads": os.cpu_count(),
        "lorakit": ours | {"trained_tokens_per_second": trained / ours["seconds"]},
        "trl": theirs | {"trained_tokens_per_second": trained / theirs["seconds"]},
        "speed_ratio": theirs["seconds"] / ours["seconds"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "same_order": {"lorakit": [a for a, _ in pairs], "trl": [b for _, b in pairs]},
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
    }


def bench_settings(recipe: Path, steps: int, kind: str, work: Path) -> list[str]:
    """What is set in the recipe: one pass over the first rows, which are written into `work`, at a constant rate."""
    rows = work / "rows.jsonl"
    lines = load(recipe).recipe.data.train
    rows.write_text("".join(Path(str(lines)).read_text(encoding="utf-8").splitlines(keepends=True)[: steps * BATCH]))
    return [
        f"data.train={rows}",
        "data.eval=null",
        "evaluate.metrics=[]",
        "model.dtype=float32",
        "train.epochs=1",
        f"adapter.kind={kind}",
        f"train.batch_size={BATCH}",
        f"train.learning_rate={RATE}",
        f"train.seed={SEED}",
        "train.schedule=constant",
        "train.warmup=0",
        "train.save_every=100000",
    ]


def mean_of(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two runs of lorakit, before and after TRL's: the machine's speed drifts, and their losses must be the same."""
    if one["losses"] != other["losses"]:
        raise SystemExit("two runs of lorakit with one seed gave different losses")
    return {name: value if name == "losses" else (value + other[name]) / 2 for name, value in one.items()}


def run_lorakit(recipe: Path, settings: list[str], folder: Path, devices: int = 1) -> dict[str, Any]:
    """One `lorakit train`: seconds in the training loop and of the whole command, peak memory, each step's loss."""
    command = [sys.executable, "-m", "lorakit", "train", str(recipe), "--json", "--quiet", "-o", str(folder)]
    command += ["--devices", str(devices)] if devices > 1 else []
    for setting in settings:
        command += ["--set", setting]
    out, wall, peak = measured(command, processes=devices)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    outcome = json.loads(out)
    return {
        "seconds": outcome["seconds"],
        **{name: outcome[name] for name in ("seconds_a_step", "reduced_bytes", "reduction_seconds") if devices > 1},
        "wall_seconds": wall,
        "peak_bytes": peak,
        "losses": [line["loss"] for line in log if "loss" in line],
    }


def run_trl(
    prepared: Prepared, order: Any, steps: int, kind: str, folder: Path, sampling: str, devices: int = 1
) -> dict[str, Any]:
    """One `trl sft` on the same examples, already rendered and masked; on several devices its script under torchrun,
    since `accelerate launch --cpu`, which `trl sft` starts with, runs one process however many it is asked for."""
    examples = [prepared.train.rows[index] for index in order][: steps * BATCH]
    if devices > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(devices)]
        command = [*torchrun, str(Path(trl.__file__).parent / "scripts" / "sft.py")]
    else:
        command = [shutil.which("trl", path=str(Path(sys.executable).parent)) or "trl", "sft"]
    command += trl_options(prepared, examples, steps, BATCH // devices, folder)
    command += ["--use_dora"] if kind == "dora" else []
    command += ["--dtype", "float32", "--use_cpu", "--bf16", "False"]
    command += ["--gradient_checkpointing", "False", "--train_sampling_strategy", sampling]
    out, wall, peak = measured(command, processes=devices)
    return {**trl_figures(out), "wall_seconds": wall, "peak_bytes": peak}


def trl_options(prepared: Prepared, examples: list[Any], steps: int, micro_batch: int, folder: Path) -> list[str]:
    """The options of `trl sft` that hold on every device; the examples are written into the folder."""
    data = folder / "data"
    data.mkdir(parents=True)
    lines = [json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) for row in examples]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--model_name_or_path", str(prepared.base.folder), "--dataset_name", str(data)]
    options += ["--output_dir", str(folder / "out"), "--max_steps", str(steps), "--seed", str(SEED)]
    options += ["--per_device_train_batch_size", str(micro_batch)]
    options += ["--learning_rate", str(RATE), "--lr_scheduler_type", "constant"]
    options += ["--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]
    options += ["--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.0"]
    return [*options, "--lora_target_modules", "all-linear"]


def trl_figures(out: str) -> dict[str, Any]:
    """Seconds of the loop and each step's loss, from what `trl sft` prints."""
    runtime = re.search(r"'train_runtime': '?([0-9.e+-]+)", out)
    if runtime is None:
        raise SystemExit(f"trl printed no train_runtime:\n{out[-3000:]}")
    return {
        "seconds": float(runtime[1]),
        "losses": [float(match) for match in re.findall(r"'loss': '?([0-9.e+-]+)", out)],
    }


def measured(command: list[str], limit: float | None = None, processes: int = 1) -> tuple[str, float, int]:
    """A command's standard output, wall seconds, and the peak resident memory of its largest process in bytes. Its
    `processes` share the cores.

    After `limit` seconds it is ended, which counts as a failure.
    """
    threads = str((os.cpu_count() or 1) // processes)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "MKL_NUM_THREADS": threads}
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, largest_resident(process.pid))
            time.sleep(0.1)
            if limit is not None and time.monotonic() - begin > limit:
                process.kill()
                raise SystemExit(f"{' '.join(command[:4])}: ended after {limit:.0f} s")
        wall = time.monotonic() - begin
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:3])} failed:\n{out.read()[-2000:]}\n{err.read()[-3000:]}")
        return out.read(), wall, peak


def largest_resident(pid: int) -> int:
    """The resident bytes of the largest process in a tree."""
    import psutil

    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return max(process.memory_info().rss for process in tree)
    except psutil.Error:
        return 0


def show(figures: dict[str, Any]) -> None:
    """The table and the ratios."""
    rows = []
    for name in ("lorakit", "trl"):
        one = figures[name]
        rows.append(
            [
                {"trl": "trl sft"}.get(name, name),
                f"{one['trained_tokens_per_second']:.1f}",
                f"{one['seconds']:.1f}",
                f"{one['wall_seconds']:.1f}",
                f"{one['peak_bytes'] / 1e9:.2f}",
                f"{sum(one['losses'][-5:]) / 5:.4f}",
            ]
        )
    columns = ["", "trained tokens/s", "loop s", "command s", "peak GB", "loss, last 5 steps"]
    title = f"{figures['steps']} steps of {BATCH} rows, {figures['trained_tokens']:,} trained tokens"
    result_table(title, columns, rows)
    print(f"speed: lorakit trains {figures['speed_ratio']:.2f} times the tokens a second of trl sft")
    print(f"memory: lorakit's peak is {figures['memory_ratio']:.2f} of trl sft's")
    print(
        f"losses, same rows in the same order, largest difference of a step: {figures['largest_loss_difference']:.2g}"
    )
    for name in ("lorakit", "trl"):
        print(f"  {name:8}", "  ".join(f"{loss:.4f}" for loss in figures["same_order"][name]))


if __name__ == "__main__":
    main()
