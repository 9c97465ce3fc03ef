"""Merging a 2 GB model of 8 shards: time and memory of lorakit's merge, beside PEFT's and beside copying the files.

A Llama of random weights in bfloat16 is trained for one step by `lorakit train`, so that there is a run to merge. Each
way then runs in a process of its own, the files of the base in the page cache for all. Memory is the peak of resident
memory over what the process held after its imports. The copy reads and writes the same bytes and flushes them to
disk, as a merge does: it is the limit of speed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "copy of the files": "the limit",
    "lorakit, the merge": "`--no-proof`: fold, write, flush",
    "lorakit, merged and proved": "the same, and the proof on held-out rows",
    "PEFT": "`merge_and_unload` and `save_pretrained`",
}
_RECIPE = """\
name: bench-merge
model: {{base: {base}, dtype: float32}}
adapter: {{rank: 16, alpha: 32}}
data: {{train: {data}, eval: 0.02, max_length: 96}}
train: {{steps: 1, batch_size: 1, learning_rate: 0.001, eval_every: 1, save_every: 1, gradient_checkpointing: true}}
output: {{dir: {run}}}
"""


def main() -> None:
    """Make the model and the run where they are not there, measure each way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-merge", help="where model and run are kept")
    parser.add_argument("--layers", type=int, default=20, help="of 90 MB each")
    parser.add_argument("--rounds", type=int, default=3, help="the least time of these counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.measure, options.work)))
        return
    _prepare(options.work, options.layers)
    found = {}
    for way in WAYS:
        figures = [_in_a_process(way, options.work) for _ in range(options.rounds)]
        found[way] = {
            "seconds": min(one["seconds"] for one in figures),
            "memory": max(one["memory"] for one in figures),
        }
    _print(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _prepare(work: Path, layers: int) -> None:
    """A random Llama in 8 shards, and a run of one step on it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from lorakit.model.resolve import resolve_base
    from lorakit.progress import Silent

    base, run = work / "base", work / "run"
    if not (base / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_base("HuggingFaceTB/SmolLM2-135M-Instruct", "main", Silent()).folder
        )
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(base, max_shard_size=int(size / 7.4))
        tokenizer.save_pretrained(base)
    if not (run / "adapter").is_dir():
        recipe = work / "recipe.yaml"
        data = ROOT / "recipes/debian-json/train.jsonl"
        recipe.write_text(_RECIPE.format(base=base, data=data, run=run), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "lorakit", "train", str(recipe), "--overwrite"], check=True)


def _in_a_process(way: str, work: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", way, "--work", str(work)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{way}: {figures['seconds']:.1f} s, {figures['memory'] / 1e6:.0f} MB", file=sys.stderr)
    return figures


def _measure(way: str, work: Path) -> dict[str, float]:
    """One way, once: seconds, and bytes of peak memory over the beginning."""
    import peft
    import torch
    import transformers

    from lorakit.merge.inputs import input_of_run
    from lorakit.merge.run import merge
    from lorakit.model.tokenizer import quiet_libraries
    from lorakit.output_dir import claim_output
    from lorakit.prepare import reopen_run
    from lorakit.progress import Silent

    quiet_libraries()
    base, run, output = work / "base", work / "run", work / "merged"
    shutil.rmtree(output, ignore_errors=True)
    for file in base.glob("*.safetensors"):
        file.read_bytes()  # into the page cache
    opened, prepared = reopen_run(run, Silent())
    begun, before = time.perf_counter(), _peak_from_here()
    if way == "copy of the files":
        output.mkdir()
        for file in base.iterdir():
            _copy(file, output / file.name)
    elif way == "PEFT":
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(model, run / "adapter").merge_and_unload()
        model.save_pretrained(output, max_shard_size="300MB")
        for file in output.iterdir():
            _flush(file)
    else:
        with claim_output(output, overwrite=False):
            merge(input_of_run(opened, prepared, Silent()), output, Silent(), proved=way.endswith("proved"))
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "memory": _peak() - before}


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(1 << 24):
            write.write(block)
    _flush(target)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _peak_from_here() -> int:
    """Forget the peak of resident memory so far; what is held now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _print(found: dict[str, dict[str, float]]) -> None:
    limit = found["copy of the files"]["seconds"]
    print("| | | seconds | over the copy | peak memory above the libraries |\n|---|---|---|---|---|")
    for way, figures in found.items():
        ratio, memory = figures["seconds"] / limit, figures["memory"] / 1e6
        print(f"| {way} | {WAYS[way]} | {figures['seconds']:.1f} | {ratio:.2f} | {memory:,.0f} MB |")


if __name__ == "__main__":
    main()
