"""`lorakit benchmark` against lm-eval's own command on the same files: base and adapter, in float32, without a network.

Each is a process of its own, timed from its start to its end. lorakit's scores both models; lm-eval's is run for each.
Its tasks are its own YAML files with the data set's name exchanged for the files of DATA, and with lorakit's confined
metric in place of the script `code_eval` that it would fetch from the hub.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("base", "adapter")
FILES = {
    "gsm8k": {"test": "gsm8k-test.jsonl", "train": "gsm8k-train-part.jsonl"},
    "humaneval": {"test": "HumanEval.jsonl.gz"},
    "gsm8k_cot": {"test": "gsm8k-test.jsonl"},
}


def main() -> None:
    """Train the run where it is not there, measure both commands on each task, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "data", type=Path, help="a folder with " + ", ".join(sorted({n for f in FILES.values() for n in f.values()}))
    )
    parser.add_argument("--run", type=Path, default=ROOT / "runs/bench-tasks", help="trained where it is not there")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of that training")
    parser.add_argument("--tasks", nargs="+", choices=FILES, default=["gsm8k", "humaneval"])
    parser.add_argument("--limit", type=int, default=200, help="rows of each task")
    parser.add_argument("--batch", default="1", help="lm-eval's batch size: 1 is its default")
    options = parser.parse_args()
    if not (options.run / "adapter").is_dir():
        recipe, settings = (
            ROOT / "recipes/debian-json/recipe.yaml",
            (f"train.steps={options.steps}", "model.dtype=float32"),
        )
        _run(["lorakit", "train", recipe, "--output", options.run, *(f"--set={one}" for one in settings)])
    figures, times = [], []
    for task in options.tasks:
        ours, seconds = _lorakit(task, options)
        of_models = {model: _lm_eval(task, model, options) for model in MODELS}
        for model, (theirs, _) in of_models.items():
            figures += [f"{task} | {model} | {name} | {value} | {theirs[name]}" for name, value in ours[model].items()]
        times.append([task, seconds, *(of_model[1] for of_model in of_models.values())])
    _print_table("task | model | figure | lorakit | lm-eval", figures)
    times.append(["all", *(sum(column) for column in list(zip(*times, strict=True))[1:])])
    rows = [
        f"{task} | {ours:.0f} | {base:.0f} | {adapter:.0f} | {(base + adapter) / ours:.2f}"
        for task, ours, base, adapter in times
    ]
    _print_table("task | lorakit, base and adapter, s | lm-eval, base, s | lm-eval, adapter, s | ratio", rows)


def _print_table(heading: str, rows: list[str]) -> None:
    print(f"\n| {heading} |\n" + "|---" * (heading.count("|") + 1) + "|")
    print("\n".join(f"| {row} |" for row in rows), flush=True)


def _run(words: list[Any]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _lorakit(task: str, options: argparse.Namespace) -> tuple[dict[str, dict[str, float]], float]:
    with tempfile.TemporaryDirectory() as folder:
        given = [
            "--tasks",
            task,
            "--benchmark-data",
            options.data,
            "--limit",
            options.limit,
            "--allow-code",
            "-o",
            folder,
        ]
        seconds = _run(["lorakit", "benchmark", options.run, *given, "--quiet"])
        (file,) = Path(folder).glob("tasks-*.json")
        models_of = json.loads(file.read_text())["models"]
    figures = {
        name: {f"{one['metric']},{one['filter'] or 'none'}": one["value"] for one in scores}
        for name, scores in models_of.items()
    }
    return figures, seconds


def _lm_eval(task: str, model: str, options: argparse.Namespace) -> tuple[dict[str, float], float]:
    from lorakit.prepare import reopen_run
    from lorakit.progress import Silent

    base = reopen_run(options.run, Silent())[1].base.folder
    arguments = f"pretrained={base},dtype=float32" + (f",peft={options.run / 'adapter'}" if model == "adapter" else "")
    with tempfile.TemporaryDirectory() as folder:
        _write_task(Path(folder), task, options.data)
        given = ["--model", "hf", "--model_args", arguments, "--tasks", f"{task}_here", "--include_path", folder]
        given += ["--limit", options.limit, "--batch_size", options.batch, "--device", "cpu"]
        seconds = _run(["lm_eval", *given, "--confirm_run_unsafe_code", "--output_path", f"{folder}/results"])
        (file,) = Path(folder, "results").rglob("*.json")
        results = json.loads(file.read_text())["results"][f"{task}_here"]
    return {name: value for name, value in results.items() if isinstance(value, float)}, seconds


def _write_task(folder: Path, task: str, data: Path) -> None:
    """lm-eval's own definition of a task, on local files, under a name of its own."""
    import lm_eval.tasks

    source = Path(lm_eval.tasks.__file__).parent / task.partition("_")[0]
    texts = (file.read_text() for file in source.glob("*.yaml"))
    lines = next(text for text in texts if f"task: {task}\n" in text).splitlines()
    files = {split: str((data / name).resolve()) for split, name in FILES[task].items()}
    replaced = {
        "task:": f"task: {task}_here",
        "dataset_path:": f"dataset_path: json\ndataset_kwargs: {json.dumps({'data_files': files})}",
        "dataset_name:": "",
    }
    kept = [next((new for word, new in replaced.items() if line.startswith(word)), line) for line in lines]
    (folder / f"{task}.yaml").write_text("\n".join(kept) + "\n")
    if (source / "utils.py").is_file():
        text = (source / "utils.py").read_text().replace('hf_evaluate.load("code_eval")', "ConfinedCode()")
        confined = "from lorakit.evaluate.benchmarks.confined_code import ConfinedCode\n"
        (folder / "utils.py").write_text(confined + text)


if __name__ == "__main__":
    main()
