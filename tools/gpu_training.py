"""The trainings of tools/gpu.py: lorakit, variants of it, and what it is compared with, on the same examples.

Each is a command in its own process under gpu_steps.py, which notes the end of every step. All get the rows in the
order of lorakit, so that speeds and losses are of the same tokens step by step; the first steps do not count for
the speed.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_rows import BATCH, ROOT, SEED
from bench_trl import trl_kind, trl_options
from gpu_parts import Bench, Skipped

from lorakit.data.rows import IGNORED
from lorakit.progress import Silent
from lorakit.recipe.load import load

if TYPE_CHECKING:
    from lorakit.prepare import Prepared


@dataclass(frozen=True)
class Case:
    """What is trained: a shape of model, a quantization, a kind of rows, and settings that differ from `auto`."""

    shape: str
    quantization: str = "none"
    rows: str = "long"
    settings: tuple[str, ...] = ()
    gpu_only: bool = False

    @property
    def name(self) -> str:
        """The part that trains it."""
        method = {"none": "lora", "nf4": "nf4"}[self.quantization]
        changed = "".join(f" {setting.split('.', 1)[1]}" for setting in self.settings)
        return f"{self.shape} {method} {self.rows}{changed}"


def prepared_case(bench: Bench, case: Case) -> "Prepared":
    """A case as lorakit settles it on this machine."""
    return _prepared(bench.work / "recipe.yaml", case_settings(bench, case))


@cache
def _prepared(recipe: Path, settings: tuple[str, ...]) -> "Prepared":
    from lorakit.prepare import prepare_run

    return prepare_run(load(recipe, settings).recipe, Silent())


def case_settings(bench: Bench, case: Case) -> tuple[str, ...]:
    """What is set in the recipe for a case."""
    return (
        f"model.base={bench.work / case.shape}",
        f"data.train={bench.work / case.rows}.jsonl",
        f"model.quantization={case.quantization}",
        *case.settings,
    )


def train_lorakit(bench: Bench, case: Case) -> dict[str, Any]:
    """`lorakit train`: its speed and peak, what the plan was off by, and what became of each `auto`."""
    _needs_model(bench, case)
    prepared = prepared_case(bench, case)
    if case.settings and prepared.recipe == prepared_case(bench, replace(case, settings=())).recipe:
        raise Skipped("`auto` chose the same")
    run = bench.work / "runs" / case.name.replace(" ", "-")
    command = ["lorakit", "train", str(bench.work / "recipe.yaml"), "--json", "--quiet", "--overwrite"]
    for setting in case_settings(bench, case):
        command += ["--set", setting]
    steps = timed_steps(bench, [*command, "--output", str(run)])
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    result, recipe = manifest["result"], prepared.recipe
    figures = speed(bench, prepared, steps) | {
        "micro_batch": result["micro_batch"],
        "gradient_checkpointing": result["gradient_checkpointing"],
        "packing": recipe.data.packing,
        "attention": recipe.model.attention,
        "dtype": recipe.model.dtype,
        "seconds": result["seconds"],
        "auto": manifest["auto"],
    }
    peak = figures["peak"] = steps.get("peak", result["peak_memory"])
    if prepared.expected:
        planned = prepared.expected.allocated if "peak" in steps else prepared.expected.total
        figures |= {"planned_peak": planned, "planned_error": round(planned / peak - 1, 4)}
    return figures


def train_rival(bench: Bench, case: Case, rival: str) -> dict[str, Any]:
    """`trl sft`, with Liger's kernels or without, or Unsloth, on the same examples with lorakit's micro-batch and
    checkpointing; and lorakit's part over it."""
    package = {"trl": "trl", "liger": "liger_kernel", "unsloth": "unsloth"}[rival]
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed here")
    ours = bench.results.get(case.name, {})
    if ours.get("state") != "done":
        raise Skipped("lorakit's own training gave no settings to compare with")
    prepared = prepared_case(bench, case)
    folder = bench.work / f"{rival}-{case.name.replace(' ', '-')}"
    at_once = rows_at_once(ours, case)
    examples = [prepared.train.rows[row] for batch in batches_of(prepared) for row in batch]
    options = trl_options(prepared, examples, bench.steps, at_once, folder)
    if rival == "unsloth":
        data, base = folder / "data" / "train.jsonl", str(prepared.base.folder)
        command = ["gpu_unsloth", base, str(data), str(folder / "out"), str(bench.steps), str(at_once)]
        command += [case.quantization]
    else:
        command = ["trl.scripts.sft", *options, *trl_kind("lora", case.quantization), *trl_extras(bench, ours, at_once)]
        command += ["--use_liger_kernel", "True"] if rival == "liger" else []
    steps = timed_steps(bench, command)
    figures = speed(bench, prepared, steps) | {"rows_at_once": at_once}
    figures["peak"] = steps.get("peak", figures.pop("resident"))
    figures["lorakit_times_as_fast"] = round(ours["tokens_per_second"] / figures["tokens_per_second"], 2)
    figures["lorakit_peak_share"] = round(ours["peak"] / figures["peak"], 3)
    return figures


def trl_extras(bench: Bench, ours: dict[str, Any], at_once: int) -> list[str]:
    """The options that depend on the machine, and on what lorakit took."""
    gpu = bench.results["environment"]["device"] != "cpu"
    options = ["--gradient_accumulation_steps", str(BATCH // at_once), "--train_sampling_strategy", "sequential"]
    options += ["--gradient_checkpointing", str(ours["gradient_checkpointing"])]
    options += ["--dtype", "bfloat16"] if gpu else ["--dtype", "float32", "--use_cpu", "--bf16", "False"]
    return [*options, "--max_length", "4096", "--attn_implementation", "sdpa"]


def rows_at_once(ours: dict[str, Any], case: Case) -> int:
    """The rows of a micro-batch of the others: lorakit's, in a number that divides the step; of short rows that
    lorakit packs, as many as a step has."""
    if ours["packing"] == "on" and case.rows == "short":
        return BATCH
    return max(count for count in (1, 2, 4, 8) if count <= min(BATCH, ours["micro_batch"]))


def batches_of(prepared: "Prepared") -> list[list[int]]:
    """The rows of each step, in lorakit's order."""
    from lorakit.data.batches import epoch_batches

    return epoch_batches(prepared.train.lengths(), BATCH, SEED, 0)


def timed_steps(bench: Bench, command: list[str]) -> dict[str, Any]:
    """Run a training command under gpu_steps.py, and read what that wrote."""
    file = bench.work / "steps.json"
    file.unlink(missing_ok=True)
    done = bench.run([sys.executable, str(ROOT / "tools/gpu_steps.py"), str(file), *command])
    if not file.is_file():
        raise RuntimeError(f"no step was seen:\n{done.out[-2000:]}")
    return {**json.loads(file.read_text(encoding="utf-8")), "resident": done.peak, "wall_seconds": done.wall}


def speed(bench: Bench, prepared: "Prepared", steps: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second over the steps that count, and the losses."""
    batches = [[prepared.train.rows[row] for row in batch] for batch in batches_of(prepared)]
    times, warm = steps["times"], bench.warm_steps
    seconds = times[-1] - times[warm - 1]
    counted = [row for batch in batches[warm : len(times)] for row in batch]
    trained = sum(label != IGNORED for row in counted for label in row["labels"][1:])
    return {
        "tokens_per_second": round(sum(len(row["input_ids"]) for row in counted) / seconds, 1),
        "trained_tokens_per_second": round(trained / seconds, 1),
        "seconds_a_step": round(seconds / (len(times) - warm), 4),
        "steps": len(times),
        "losses": steps["losses"],
        "loss": steps["losses"][-1],
        "reserved": steps.get("reserved"),
        "peak_before": steps.get("peak_before"),
        "resident": steps["resident"],
        "wall_seconds": round(steps["wall_seconds"], 1),
    }


def _needs_model(bench: Bench, case: Case) -> None:
    if bench.results.get(f"model {case.shape}", {}).get("state") != "done":
        raise Skipped(f"the {case.shape} model was not made")
    if case.gpu_only and bench.results["environment"]["device"] == "cpu":
        raise Skipped("only on a GPU")
    memory = bench.results["environment"].get("memory")
    if case.shape == "8b" and case.quantization == "none" and memory and memory < 24 << 30:
        raise Skipped("16 bits of 8B do not fit into this card")
