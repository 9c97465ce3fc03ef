"""How near a training step of lorakit comes to what this processor's matrix products allow, and where its time goes.

A run of `lorakit train` in this process, step by step; between the steps a large square product is timed with the same
threads, so that a machine whose speed drifts is compared with itself. Counted are the operations that the step needs:
tokens of rows, not of padding, a shared beginning once a micro-batch, nothing that is computed twice.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakit.hardware.threads import set_up_threads

set_up_threads()  # as `lorakit` does, before torch is loaded

import torch
from bench_rows import BATCH, DEBIAN, KINDS, recipe_settings
from transformers import TrainerCallback

import lorakit.train.run as training
from lorakit.console import result_table
from lorakit.plan.memory import size_run
from lorakit.plan.model_info import read_model_info
from lorakit.plan.runtime import Workload, flops_by_part, run_workload
from lorakit.prepare import Prepared, prepare_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.run_dir import open_run
from lorakit.train.batch_layout import count_trained_tokens

SIDE, TURNS = 2048, 4  # of the square product that is timed, and how often


def main() -> None:
    """Measure, print the tables, and leave them as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", choices=KINDS, nargs="+", default=["medium"], help="kinds of rows")
    parser.add_argument("--quantization", choices=["none", "nf4", "q4", "q8"], nargs="+", default=["none"])
    parser.add_argument(
        "--steps", type=int, default=6, help=f"steps of {BATCH} rows that count, after one that does not"
    )
    parser.add_argument("--set", action="append", default=[], dest="settings", help="KEY=VALUE of the recipe")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    found = {}
    for quantization in options.quantization:
        for rows in options.rows:
            figures = measure(rows, options.steps + 1, [f"model.quantization={quantization}", *options.settings])
            found[f"{rows}, {quantization}"] = figures
            show(f"{rows}, {quantization}", figures)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@dataclass
class Step:
    """What was seen of one step: seconds by part, FLOP/s of the product before and after it, what it computed."""

    peak: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    seconds: float = 0.0
    positions: int = 0  # that went through the body, padding included
    padding: int = 0
    once: float = 0.0  # tokens that a shared beginning saved
    once_squared: float = 0.0
    lengths: list[int] = field(default_factory=list)
    trained: int = 0


class StepClock(TrainerCallback):
    """Times the steps of a trainer by part, and the product between them."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[Step] = []
        self.start = self.passes = 0.0
        runner = self.runner = trainer.runner
        self.product = Product()
        self.backward, self.micro_batch, self.step = runner.backward, runner.run_micro_batch, trainer.training_step
        runner.backward, runner.run_micro_batch, trainer.training_step = self._backward, self._micro_batch, self._passes
        runner.model.get_input_embeddings().register_forward_pre_hook(self._embed)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(Step(peak=self.product.flops()))
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        step = self.steps[-1]
        step.seconds = time.perf_counter() - self.start
        step.optimizer = step.seconds - self.passes
        step.forward = self.passes - step.backward
        step.peak = (step.peak + self.product.flops()) / 2

    def _passes(self, *given: Any, **named: Any) -> Any:
        loss = self.step(*given, **named)
        self.passes = time.perf_counter() - self.start
        return loss

    def _backward(self, *given: Any, **named: Any) -> None:
        start = time.perf_counter()
        self.backward(*given, **named)
        self.steps[-1].backward += time.perf_counter() - start

    def _embed(self, _: Any, given: tuple[Any, ...]) -> None:
        if self.steps and torch.is_grad_enabled():
            self.steps[-1].positions += given[0].numel()

    def _micro_batch(self, batch: Any, *given: Any, **named: Any) -> Any:
        step = self.steps[-1]
        before = step.positions
        loss, packs = self.micro_batch(batch, *given, **named), batch.packs
        lengths = [[len(row["input_ids"]) for row in pack] for pack in packs]
        tokens, laid_out = sum(map(sum, lengths)), max(map(sum, lengths)) * len(packs)
        saved = laid_out - (step.positions - before)  # by a beginning that is computed for one row
        step.lengths += [length for pack in lengths for length in pack]
        step.trained += count_trained_tokens([row for pack in packs for row in pack])
        step.padding += laid_out - tokens
        step.once += saved
        step.once_squared += saved * (saved / (len(packs) - 1)) if saved else 0
        return loss


class Product:
    """A square product in float32."""

    def __init__(self) -> None:
        self.one, self.other = (torch.randn(SIDE, SIDE) for _ in range(2))
        self.result = torch.empty(SIDE, SIDE)

    def flops(self) -> float:
        """FLOP a second of the fastest of a few."""
        fastest = float("inf")
        for _ in range(TURNS):
            start = time.perf_counter()
            torch.mm(self.one, self.other, out=self.result)
            fastest = min(fastest, time.perf_counter() - start)
        return 2 * SIDE**3 / fastest


def measure(kind: str, steps: int, settings: list[str]) -> dict[str, Any]:
    """A run of so many steps, the first of which does not count."""
    with tempfile.TemporaryDirectory(prefix="lorakit-limit-") as name:
        work = Path(name)
        settings = [*recipe_settings(kind, steps, work), *settings]
        prepared = prepare_run(load(DEBIAN, settings).recipe, Silent())
        clocks = []

        class TimedTrainer(training.SupervisedTrainer):
            def __init__(self, **given: Any) -> None:
                super().__init__(**given)
                clocks.append(StepClock(self))
                self.add_callback(clocks[0])

        plain, training.SupervisedTrainer = training.SupervisedTrainer, TimedTrainer
        try:
            with open_run(work / "run", resume=False, overwrite=False) as run:
                training.train(prepared, run, Silent())
        finally:
            training.SupervisedTrainer = plain
        return figures_of(prepared, clocks[0].steps[1:], clocks[0].runner.micro_batch)


def figures_of(prepared: Prepared, steps: list[Step], micro_batch: int) -> dict[str, Any]:
    """Medians over the steps, and the operations of all of them by part."""
    parts = [needed_flops(prepared, step) for step in steps]
    shares = [sum(part.values()) / step.seconds / step.peak for part, step in zip(parts, steps, strict=True)]
    tokens, padding = sum(sum(step.lengths) for step in steps), sum(step.padding for step in steps)
    return {
        "threads": torch.get_num_threads(),
        "micro_batch": micro_batch,
        "steps": len(steps),
        "tokens": tokens,
        "padding": padding / (tokens + padding),
        "computed_once": sum(step.once for step in steps) / (tokens + padding),
        "trained_tokens": sum(step.trained for step in steps),
        "trained_tokens_per_second": sum(step.trained for step in steps) / sum(step.seconds for step in steps),
        "tokens_per_second": tokens / sum(step.seconds for step in steps),
        "operations": {name: sum(part[name] for part in parts) for name in parts[0]},
        "seconds": {name: statistics.median(getattr(step, name) for step in steps) for name in TIMES},
        "peak_flops": statistics.median(step.peak for step in steps),
        "peak_range": [min(step.peak for step in steps), max(step.peak for step in steps)],
        "share": statistics.median(shares),
        "shares": shares,
    }


TIMES = ("forward", "backward", "optimizer", "seconds")


def needed_flops(prepared: Prepared, step: Step) -> dict[str, float]:
    """The operations of one step by part, as `lorakit plan` counts them, and what its count leaves out: the gradient of
    what goes into the first block, which nothing needs."""
    info = read_model_info(prepared.base.folder)
    assert info and info.spec
    load = size_run(prepared.recipe, info, info.spec, prepared.machine.is_gpu)
    work: Workload = run_workload(load, 1, checkpointing=False, length=1.0)
    tokens = sum(step.lengths) - step.once
    work = replace(
        work,
        tokens=round(tokens),
        square_tokens=sum(length**2 for length in step.lengths) - step.once_squared,
        trained_tokens=step.trained,
        micro_batches=1 << 30,  # so that no head is too large for one chunk: computing it again is not needed
    )
    block = info.spec.blocks[load.trainable.first_block]
    first = [weight for weight in block if weight.sublayer == "attention" and weight.inner == info.spec.hidden]
    first = [weight for weight in first if not weight.path.endswith(("o_proj", "dense", "out_proj"))]
    parts = {name: flops for name, flops in flops_by_part(work).items() if flops}
    parts["first block's input, no gradient"] = -2.0 * tokens * sum(weight.size for weight in first)
    return parts


def show(name: str, figures: dict[str, Any]) -> None:
    """The tables of one run."""
    steps, total = figures["steps"], sum(figures["operations"].values())
    rows = [
        [part, f"{flops / steps / 1e9:,.1f}", f"{flops / total:.1%}"] for part, flops in figures["operations"].items()
    ]
    rows.append(["all", f"{total / steps / 1e9:,.1f}", ""])
    title = f"{name}: {steps} steps of {BATCH} rows, {figures['tokens'] / steps / BATCH:.0f} tokens a row"
    result_table(title, ["operations a step", "GFLOP", "share"], rows)
    whole = figures["seconds"]["seconds"]
    times = [[part, f"{seconds:.3f}", f"{seconds / whole:.1%}"] for part, seconds in figures["seconds"].items()]
    times[-1][0] = "step"
    result_table("", ["medians", "seconds", "share"], times)
    low, high = figures["peak_range"]
    print(
        f"{figures['tokens_per_second']:.0f} tokens/s, {figures['trained_tokens_per_second']:.1f} trained tokens/s; "
        f"micro-batches of {figures['micro_batch']}, {figures['padding']:.1%} padding, "
        f"{figures['computed_once']:.1%} saved by shared beginnings, {figures['threads']} threads"
    )
    print(
        f"matrix products of {SIDE} x {SIDE}: {figures['peak_flops'] / 1e9:.0f} GFLOP/s "
        f"({low / 1e9:.0f} to {high / 1e9:.0f})"
    )
    spread = f"{min(figures['shares']):.1%} to {max(figures['shares']):.1%}"
    print(f"share of the limit: {figures['share']:.1%}, the median of {steps} steps ({spread})\n")


if __name__ == "__main__":
    main()
