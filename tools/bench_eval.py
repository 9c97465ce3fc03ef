"""`lorakit eval` on debian-json against a plain loop: base and adapter over the same held-out rows, on two cores.

lorakit loads the base once and scores both models: losses, generated answers, metrics with intervals, without its
cache. The plain loop is transformers' `generate` at batch 1 on PEFT's model, and nothing else: no losses, no metrics.
Each runs in a process of its own and is timed from behind the imports, reading of the weights included. Both are
greedy, so the same answers are expected: those that differ are counted. A near tie of two tokens is decided by
rounding, which is another in a batch.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("lorakit eval", "plain loop")


def main() -> None:
    """Train the run where it is not there, measure both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/bench-eval", help="trained where it is not there")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of that training")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measured(options.measure, options.run, options.rows, options.threads)))
        return
    if not (options.run / "adapter").is_dir():
        recipe, steps = ROOT / "recipes/debian-json/recipe.yaml", f"train.steps={options.steps}"
        command = [sys.executable, "-m", "lorakit", "train", recipe, "--output", options.run, "--set", steps]
        subprocess.run([str(word) for word in command], check=True)
    found = {way: _in_a_process(way, options) for way in WAYS}
    _print(found, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _in_a_process(way: str, options: argparse.Namespace) -> dict[str, Any]:
    given = ["--run", options.run, "--rows", options.rows, "--threads", options.threads]
    command = [sys.executable, __file__, "--measure", way, *given]
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{way}: {figures['seconds']:.1f} s", file=sys.stderr)
    return figures


def _measured(way: str, folder: Path, rows: int, threads: int) -> dict[str, Any]:
    """One way, once: seconds, seconds of processor time, and the answers of base and adapter."""
    import torch

    from lorakit.prepare import reopen_run
    from lorakit.progress import Silent

    torch.set_num_threads(threads)
    run, prepared = reopen_run(folder, Silent())
    begun, busy = time.perf_counter(), time.process_time()
    answers = (_by_lorakit if way == WAYS[0] else _by_plain_loop)(run, prepared, rows)
    return {"seconds": time.perf_counter() - begun, "processor": time.process_time() - busy, "answers": answers}


def _by_lorakit(run: Any, prepared: Any, rows: int) -> dict[str, list[str]]:
    from dataclasses import replace

    from lorakit.evaluate.models import models_of_run
    from lorakit.evaluate.run import default_settings, score_models
    from lorakit.progress import Silent

    model_set = models_of_run(run, prepared)
    model_set = replace(model_set, specs=model_set.specs[:2])  # without a merged model, should one be there
    request = replace(default_settings(prepared), rows=rows, cache=False)
    evaluation = score_models(model_set, None, request, Silent())
    return {model.name: model.answers for model in evaluation.models}


def _by_plain_loop(run: Any, prepared: Any, rows: int) -> dict[str, list[str]]:
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(prepared.base.folder, dtype=torch.float32)
    model, tokenizer = peft.PeftModel.from_pretrained(base, run.adapter).eval(), prepared.tokenizer
    held_out = prepared.held_out.rows
    prompts = [row["input_ids"][: row["answer"]] for row in held_out.select(range(min(rows, len(held_out))))]
    longest = prepared.recipe.evaluate.max_new_tokens

    def answer(prompt: list[int]) -> str:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=prepared.stop_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))

    with torch.inference_mode():
        with model.disable_adapter():
            plain = [answer(prompt) for prompt in prompts]
        return {"base": plain, "adapter": [answer(prompt) for prompt in prompts]}


def _print(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    ours, plain = (found[way] for way in WAYS)
    print(f"debian-json, {len(ours['answers']['base'])} held-out rows, base and adapter, {options.threads} threads\n")
    print("| | seconds | processor seconds |\n|---|---|---|")
    for way, figures in found.items():
        print(f"| {way} | {figures['seconds']:.1f} | {figures['processor']:.1f} |")
    print(f"\nlorakit is {plain['seconds'] / ours['seconds']:.1f} times as fast", end="; ")
    apart = {
        name: sum(one != other for one, other in zip(answers, plain["answers"][name], strict=True))
        for name, answers in ours["answers"].items()
    }
    print(
        ", ".join(f"{count} of {len(plain['answers'][name])} answers of {name} differ" for name, count in apart.items())
    )


if __name__ == "__main__":
    main()
