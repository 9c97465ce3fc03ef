"""What a GPU shows in minutes: its tests, training beside `trl sft`, planned against measured memory, a merge, an eval.

Each part's figures are written into results.json and summary.md as it ends, so that a run that is cut off still tells.
A part that fails is recorded as failed, and the next one begins. The model has random weights in the shape of Llama 3.2
1B: nothing is fetched. With --rehearse everything is tiny, and runs on a processor too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import BATCH, measured, trl_figures, trl_options
from gpu_model import write_model, write_recipe, write_rows

from lorakit.atomic_io import write_atomic

ROOT = Path(__file__).resolve().parent.parent
# `trl sft` without its launcher, so that the memory of the process that trains can be asked for at its end.
TRL = """
import runpy, torch
runpy.run_module("trl.scripts.sft", run_name="__main__")
if torch.cuda.is_available():
    print("peak_allocated", torch.cuda.max_memory_allocated())
"""


@dataclass
class Bench:
    """Where the parts work, and what they found so far."""

    out: Path
    tiny: bool
    deadline: float
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def steps(self) -> int:
        return 3 if self.tiny else 60

    def left(self) -> float:
        """Seconds until the time is up."""
        return self.deadline - time.monotonic()

    def write(self) -> None:
        """Keep what is known: the figures, and a page to read."""
        write_atomic(self.out / "results.json", json.dumps(self.results, indent=2) + "\n")
        write_atomic(self.out / "summary.md", summary(self.results))

    def lorakit(self, *arguments: str) -> dict[str, Any]:
        """A command of lorakit, to its JSON document."""
        command = [sys.executable, "-m", "lorakit", *arguments, "--json", "--quiet"]
        out, wall, _ = measured(command, self.left())
        return {**json.loads(out), "wall_seconds": round(wall, 1)}


def main() -> None:
    """Run every part for which there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="where the results go")
    parser.add_argument("--minutes", type=float, default=8.5, help="no part goes on beyond this")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on a GPU or a processor")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.out, options.rehearse, time.monotonic() + 60 * options.minutes)
    for name in options.only:
        run_part(bench, name, PARTS[name])
    print((bench.out / "summary.md").read_text(encoding="utf-8"))
    sys.exit(any(figures["state"] == "failed" for figures in bench.results.values()))


def run_part(bench: Bench, name: str, part: Callable[[Bench], dict[str, Any]]) -> None:
    """One part, whatever becomes of it."""
    begin = time.monotonic()
    print(f"== {name} ({bench.left():.0f} s left)", flush=True)
    if bench.left() < 10:
        found = {"state": "no time left"}
    else:
        try:
            found = {"state": "done", **part(bench)}
        except (SystemExit, OSError, subprocess.SubprocessError, ValueError, LookupError, RuntimeError) as error:
            found = {"state": "failed", "error": str(error)[-6000:] or type(error).__name__}
            print(found["error"], flush=True)
    bench.results[name] = {**found, "took": round(time.monotonic() - begin, 1)}
    bench.write()


def environment(bench: Bench) -> dict[str, Any]:
    """The machine and the packages."""
    import torch

    from lorakit.run_dir import versions

    facts: dict[str, Any] = {"versions": versions(), "python": sys.version.split()[0], "device": "cpu"}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {"device": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        facts |= {"cuda": torch.version.cuda}
    elif not bench.tiny:
        raise RuntimeError("torch sees no GPU here. To try the script without one: tools/gpu.sh --rehearse")
    return facts


def doctor(bench: Bench) -> dict[str, Any]:
    """What `lorakit doctor` finds broken or worth a note; its exit code is 1 where something is broken."""
    command = [sys.executable, "-m", "lorakit", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=bench.left(), check=False)
    return {"exit_code": done.returncode, "findings": json.loads(done.stdout)}


def tests(bench: Bench) -> dict[str, Any]:
    """The tests that need a GPU; without one they skip."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "--timeout",
        "120",
        "-p",
        "no:cacheprovider",
        "-rfE",
        "--disable-warnings",
    ]
    log = bench.out / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [*command, "tests/test_gpu.py"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=min(200, bench.left()),
            check=False,
        ).returncode
    lines = log.read_text(encoding="utf-8").splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if code:
        print("\n".join(lines[-60:]))
    return {"exit_code": code, "counts": lines[-1].strip("= "), "failures": failures}


def prepare(bench: Bench) -> dict[str, Any]:
    """The base with random weights, its tokenizer, rows of random words, and the recipe."""
    parameters = write_model(bench.work / "base", bench.tiny)
    rows = {"train": bench.steps * BATCH, "eval": 4 if bench.tiny else 32}
    write_rows(bench.work, rows, (10, 40) if bench.tiny else (30, 400))
    write_recipe(bench.work, 8 if bench.tiny else 64)
    return {"parameters": parameters}


def training(bench: Bench, quantization: str) -> dict[str, Any]:
    """`lorakit plan` and `lorakit train`, and what the plan was off by."""
    recipe, run = str(bench.work / "recipe.yaml"), bench.work / quantization
    settings = ("--set", f"model.quantization={quantization}")
    plan = bench.lorakit("plan", recipe, *settings)
    bench.lorakit("train", recipe, *settings, "--output", str(run), "--overwrite")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    result, longest = manifest["result"], plan["memory"]["longest"]
    predicted = longest["total"] - (longest["overhead"] if manifest["machine"]["device"] == "cuda" else 0)
    return {
        "trained_tokens_per_second": result["trained_tokens_per_second"],
        "seconds": result["seconds"],
        "micro_batch": result["micro_batch"],
        "gradient_checkpointing": result["gradient_checkpointing"],
        "loss": result["loss"],
        "peak": result["peak_memory"],
        "planned_peak": predicted,
        "planned_error": round(predicted / result["peak_memory"] - 1, 4),
        "planned_seconds": plan["seconds"],
        "trained_tokens": manifest["data"]["train"]["trained_tokens"],
        "tokens": manifest["data"]["train"]["tokens"],
        "auto": manifest["auto"],
    }


def trl(bench: Bench, quantization: str) -> dict[str, Any]:
    """`trl sft` on the same examples, with the same micro-batch and checkpointing as lorakit took."""
    from lorakit.prepare import prepare_run
    from lorakit.progress import Silent
    from lorakit.recipe.load import load

    ours = bench.results.get(quantization_part(quantization), {})
    if ours.get("state") != "done":
        raise RuntimeError("lorakit's own training gave no settings to compare with")
    prepared = prepare_run(load(bench.work / "recipe.yaml").recipe, Silent())
    micro_batch, folder = ours["micro_batch"], bench.work / f"trl-{quantization}-{time.time_ns()}"
    options = trl_options(prepared, list(prepared.train.rows), bench.steps, micro_batch, folder)
    options += ["--gradient_accumulation_steps", str(BATCH // micro_batch)]
    options += ["--gradient_checkpointing", str(ours["gradient_checkpointing"])]
    gpu = bench.results["environment"]["device"] != "cpu"
    options += ["--dtype", "bfloat16"] if gpu else ["--dtype", "float32", "--use_cpu", "--bf16", "False"]
    options += ["--max_length", "4096", "--attn_implementation", "sdpa"]
    if quantization == "nf4":
        options += ["--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant"]
    out, _, resident = measured([sys.executable, "-c", TRL, *options], bench.left())
    allocated = re.search(r"^peak_allocated (\d+)", out, re.MULTILINE)
    figures = trl_figures(out)
    rate, peak = ours["trained_tokens"] / figures["seconds"], int(allocated[1]) if allocated else resident
    return {
        "seconds": figures["seconds"],
        "trained_tokens_per_second": round(rate, 1),
        "loss": figures["losses"][-1],
        "peak": peak,
        "lorakit_times_as_fast": round(ours["trained_tokens_per_second"] / rate, 2),
        "lorakit_peak_share": round(ours["peak"] / peak, 3),
    }


def quantization_part(quantization: str) -> str:
    """The name of the part that trains with a quantization."""
    return {"none": "lora", "nf4": "nf4"}[quantization]


def merging(bench: Bench) -> dict[str, Any]:
    """Both adapters merged, with their proofs."""
    return {
        name: bench.lorakit("merge", str(bench.work / name), "--overwrite")
        for name in ("none", "nf4")
        if (bench.work / name / "adapter").is_dir()
    }


def evaluation(bench: Bench) -> dict[str, Any]:
    """Base and adapter of the unquantized run on the held-out rows."""
    found = bench.lorakit("eval", str(bench.work / "none"), "--no-cache")
    return {"wall_seconds": found["wall_seconds"], "models": found.get("models")}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "environment": environment,
    "tests": tests,
    "model": prepare,
    "lora": lambda bench: training(bench, "none"),
    "trl-lora": lambda bench: trl(bench, "none"),
    "nf4": lambda bench: training(bench, "nf4"),
    "trl-nf4": lambda bench: trl(bench, "nf4"),
    "merge": merging,
    "eval": evaluation,
    "doctor": doctor,
}


def summary(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    machine = results.get("environment", {})
    lines = [f"# {machine.get('device', 'unknown device')}, torch {machine.get('versions', {}).get('torch')}", ""]
    lines += ["| part | state | seconds |", "|---|---|---:|"]
    lines += [f"| {name} | {found['state']} | {found['took']} |" for name, found in results.items()]
    done = {name: found for name, found in results.items() if found["state"] == "done"}
    lines += ["", "| | trained tokens/s | loop s | peak GB | planned GB | off by | last loss |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    lines += [training_line(name, done[name]) for name in ("lora", "trl-lora", "nf4", "trl-nf4") if name in done]
    for name in ("trl-lora", "trl-nf4"):
        if name in done:
            speed, share = done[name]["lorakit_times_as_fast"], done[name]["lorakit_peak_share"]
            lines += ["", f"{name}: lorakit trains {speed} times the tokens a second, at {share:.2f} of its peak"]
    if "tests" in done:
        lines += ["", f"GPU tests: {done['tests']['counts']}", *done["tests"]["failures"]]
    for name, found in results.items():
        if found["state"] == "failed":
            lines += ["", f"## {name} failed", "```text", found["error"], "```"]
    return "\n".join(lines) + "\n"


def training_line(name: str, one: dict[str, Any]) -> str:
    """A line of the table of trainings."""
    planned = f"{one['planned_peak'] / 1e9:.2f} | {one['planned_error']:+.1%}" if "planned_peak" in one else "- | -"
    figures = f"{one['trained_tokens_per_second']:.0f} | {one['seconds']:.1f} | {one['peak'] / 1e9:.2f}"
    return f"| {name} | {figures} | {planned} | {one['loss']:.4f} |"


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
