"""What a GPU shows in minutes: its tests, training beside `trl sft`, Liger and Unsloth, planned and measured memory.

Each part's figures are written into results.json and summary.md as it ends, so that a run that is cut off still tells;
each has a time limit, and what is worth most comes first. A part that fails is recorded as failed, and the next one
begins. The models have random weights in the shapes of Llama 3.2 1B and 3.1 8B: nothing is fetched. With --rehearse
everything is tiny, and runs on a processor too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_rows import BATCH, ROOT
from gpu_model import write_model, write_recipe, write_rows
from gpu_parts import Bench, Skipped, run_part
from gpu_training import Case, train_lorakit, train_rival

ROWS = {"long": (350, 450), "short": (15, 60)}  # words of a question, and of its answer
TINY_ROWS = {"long": (20, 40), "short": (5, 15)}
REHEARSED = 5  # times the limit of a part: a processor that has other work beside it
LONG, SHORT, NF4 = Case("1b"), Case("1b", rows="short"), Case("1b", "nf4")
LARGE, LARGE_NF4 = Case("8b"), Case("8b", "nf4")


def main() -> None:
    """Run every part for which there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="where the results go")
    parser.add_argument("--minutes", type=float, help="no part goes on beyond this: 8.5, or 30 of a rehearsal")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on a GPU or a processor")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    minutes = options.minutes or (30 if options.rehearse else 8.5)
    bench = Bench(options.out.absolute(), options.rehearse, time.monotonic() + 60 * minutes, summary=summary)
    for name in options.only:
        limit, part = PARTS[name]
        run_part(bench, name, part, REHEARSED * limit if options.rehearse else limit)
    print((bench.out / "summary.md").read_text(encoding="utf-8"))
    sys.exit(any(figures["state"] == "failed" for figures in bench.results.values()))


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
            timeout=bench.left(),
            check=False,
        ).returncode
    lines = log.read_text(encoding="utf-8").splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if code:
        print("\n".join(lines[-60:]))
    return {"exit_code": code, "counts": lines[-1].strip("= "), "failures": failures}


def model(bench: Bench, shape: str) -> dict[str, Any]:
    """A base with random weights and its tokenizer; with the first one the rows of random words, and the recipe."""
    bench.work.mkdir(parents=True, exist_ok=True)
    if not (bench.work / "recipe.yaml").is_file():
        for name, words in (TINY_ROWS if bench.tiny else ROWS).items():
            write_rows(bench.work, name, bench.steps * BATCH, words)
        write_rows(bench.work, "eval", 4 if bench.tiny else 16, (TINY_ROWS if bench.tiny else ROWS)["short"])
        write_recipe(bench.work, 8 if bench.tiny else 64)
    folder = bench.work / shape
    folder.mkdir(exist_ok=True)
    return {"parameters": write_model(folder, shape, bench.tiny)}


def merging(bench: Bench) -> dict[str, Any]:
    """The adapters of both quantizations merged, with their proofs."""
    return {case.name: lorakit(bench, "merge", run_of(bench, case), "--overwrite") for case in (SHORT, NF4)}


def evaluation(bench: Bench) -> dict[str, Any]:
    """Base and adapter on the held-out rows."""
    found = lorakit(bench, "eval", run_of(bench, SHORT), "--no-cache")
    return {"wall_seconds": found["wall_seconds"], "models": found.get("models")}


def run_of(bench: Bench, case: Case) -> str:
    """The folder of a finished run."""
    if bench.results.get(case.name, {}).get("state") != "done":
        raise Skipped(f"{case.name} was not trained")
    return str(bench.work / "runs" / case.name.replace(" ", "-"))


def lorakit(bench: Bench, *arguments: str) -> dict[str, Any]:
    """A command of lorakit, to its JSON document."""
    done = bench.run([sys.executable, "-m", "lorakit", *arguments, "--json", "--quiet"])
    return {**json.loads(done.out), "wall_seconds": round(done.wall, 1)}


Part = tuple[float, Callable[[Bench], dict[str, Any]]]  # seconds it may take at most, and what it does


def training(limit: float, case: Case, *rivals: str) -> dict[str, Part]:
    """The part that trains a case with lorakit, and those that train it with others."""
    parts: dict[str, Part] = {case.name: (limit, partial(train_lorakit, case=case))}
    return parts | {f"{rival} {case.name}": (limit, partial(train_rival, case=case, rival=rival)) for rival in rivals}


# What each choice of lorakit's is worth: the case, and what is set otherwise than `auto` has it on a GPU.
VARIANTS = [
    Case("1b", settings=("train.kernels=off",)),
    Case("1b", rows="short", settings=("data.packing=off",)),
    Case("1b", settings=("data.packing=off", "model.attention=sdpa")),
    Case("1b", settings=("train.offload_activations=true",), gpu_only=True),
    Case("1b", settings=("train.compile=off",)),
]
COMPILED = Case("1b", settings=("train.compile=on",))

PARTS: dict[str, Part] = {
    "environment": (30, environment),
    "model 1b": (60, partial(model, shape="1b")),
    **training(60, LONG, "trl"),
    "tests": (100, tests),
    **training(60, SHORT, "trl"),
    "model 8b": (60, partial(model, shape="8b")),
    **training(90, LARGE_NF4, "trl"),
    **{name: part for case in VARIANTS for name, part in training(45, case).items()},
    **training(60, NF4, "trl"),
    "liger 1b lora long": (45, partial(train_rival, case=LONG, rival="liger")),
    "unsloth 1b lora long": (60, partial(train_rival, case=LONG, rival="unsloth")),
    "unsloth 8b nf4 long": (90, partial(train_rival, case=LARGE_NF4, rival="unsloth")),
    **training(90, LARGE, "trl"),
    **training(120, COMPILED),  # compiling alone may take a minute
    "merge": (60, merging),
    "eval": (45, evaluation),
    "doctor": (45, doctor),
}


def summary(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    machine = results.get("environment", {})
    lines = [f"# {machine.get('device', 'unknown device')}, torch {machine.get('versions', {}).get('torch')}", ""]
    lines += ["| part | state | seconds |", "|---|---|---:|"]
    lines += [f"| {name} | {found['state']} | {found['took']} |" for name, found in results.items()]
    done = {name: found for name, found in results.items() if found["state"] == "done"}
    lines += ["", "| | tokens/s | trained tokens/s | s a step | peak GB | planned GB | off by | loss after |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [training_line(name, found) for name, found in done.items() if "tokens_per_second" in found]
    for name, found in done.items():
        if "lorakit_times_as_fast" in found:
            speed, share = found["lorakit_times_as_fast"], found["lorakit_peak_share"]
            lines += ["", f"{name}: lorakit trains {speed} times the tokens a second, at {share:.2f} of its peak"]
    if "tests" in done:
        lines += ["", f"GPU tests: {done['tests']['counts']}", *done["tests"]["failures"]]
    for name, found in results.items():
        if found["state"] == "skipped":
            lines += ["", f"{name} was skipped: {found['reason']}"]
        if found["state"] == "failed":
            lines += ["", f"## {name} failed", "```text", found["error"], "```"]
    return "\n".join(lines) + "\n"


def training_line(name: str, one: dict[str, Any]) -> str:
    """A line of the table of trainings."""
    planned = f"{one['planned_peak'] / 1e9:.2f} | {one['planned_error']:+.1%}" if "planned_peak" in one else "- | -"
    rates = f"{one['tokens_per_second']:.0f} | {one['trained_tokens_per_second']:.0f} | {one['seconds_a_step']:.3f}"
    return f"| {name} | {rates} | {one['peak'] / 1e9:.2f} | {planned} | {one['loss']:.4f} |"


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
