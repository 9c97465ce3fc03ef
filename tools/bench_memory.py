"""The memory model against published peaks of GPUs, and against what runs of SmolLM2 take on this processor.

The published rows are in published_memory.csv with their sources; `--rows FILE` adds a table with the same columns. On
this machine each setting is a training of its own, of two steps in a process of its own: its peak of resident memory
beside what `lorakit plan` says of the same recipe before.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from published_memory import PUBLISHED, Compared, compared

ROOT = Path(__file__).resolve().parent.parent
_TEXTS = ROOT / "lorakit/data/general/texts.jsonl"
_RECIPE = """\
name: bench-memory
model: {base: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: float32}
adapter: {rank: 16, alpha: 32}
data: {train: rows200.jsonl, max_length: 4096, clean: {near_duplicates: off, contradictions: off, style: off}}
train: {steps: 2, batch_size: 8, micro_batch: 8, learning_rate: 0.0003, save_every: 2, gradient_checkpointing: false}
"""
# Words a row; the options of one run each.
WORDS = (100, 200, 400, 800)
_RECOMPUTED = "data.train=rows400.jsonl train.gradient_checkpointing=true"
SETTINGS = {
    "1 row of 270 tokens": "train.micro_batch=1 train.batch_size=1",
    "8 rows of 160 tokens": "data.train=rows100.jsonl",
    "8 rows of 270 tokens": "",
    "8 rows of 500 tokens": "data.train=rows400.jsonl",
    "4 rows of 970 tokens": "data.train=rows800.jsonl train.micro_batch=4",
    "8 rows of 500 tokens, checkpointing": _RECOMPUTED,
    "8 rows of 500 tokens, checkpointing, NF4": f"{_RECOMPUTED} model.quantization=nf4",
    "8 rows of 500 tokens, checkpointing, 8 bits": f"{_RECOMPUTED} model.quantization=q8",
    "8 rows of 270 tokens, NF4": "model.quantization=nf4",
    "4 rows of 500 tokens, 8 bits": "data.train=rows400.jsonl train.micro_batch=4 model.quantization=q8",
    "2 rows of 270 tokens, bfloat16": "model.dtype=bfloat16 train.micro_batch=2 train.batch_size=2",
    "4 rows of 270 tokens, full fine-tuning": "adapter=null adapter.kind=none train.micro_batch=4 train.batch_size=4",
    "8 rows of 270 tokens, q and v only": "adapter.targets=[q_proj,v_proj]",
    "4 rows of 500 tokens, eager attention": "data.train=rows400.jsonl train.micro_batch=4 model.attention=eager",
    "4 rows of 970 tokens, eager attention, checkpointing": (
        "data.train=rows800.jsonl train.micro_batch=4 model.attention=eager train.gradient_checkpointing=true"
    ),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="another table of published peaks, with the same columns")
    parser.add_argument("--published-only", action="store_true", help="no runs on this machine")
    arguments = parser.parse_args()
    for path in [PUBLISHED, *([arguments.rows] if arguments.rows else [])]:
        rows = list(compared(path))
        print_published(rows)
        print_groups([one for one in rows if one.memory and not one.is_bound])
    if not arguments.published_only:
        print_measured(measured())


def print_published(rows: list[Compared]) -> None:
    """A Markdown table of predicted and published peaks."""
    print("| model | method | tokens | predicted GiB | published GiB | error | source |")
    print("|---|---|---|---:|---:|---:|---|")
    for one in rows:
        row = one.row
        recomputed = ", checkpointing" if row["gradient_checkpointing"] == "yes" else ""
        tokens = f"{row['micro_batch']} x {row['sequence_length']}{recomputed}"
        found = f"{one.memory.allocated / 2**30:.2f}" if one.memory else "-"
        error = one.why or (f"{one.error:+.1%}" if not one.is_bound else "under it" if one.error <= 0 else "over it")
        published = f"{'under ' * one.is_bound}{row['peak_gib']}"
        print(f"| {row['model']} | {row['method']} | {tokens} | {found} | {published} | {error} | {row['source']} |")


def print_groups(rows: list[Compared]) -> None:
    """A Markdown table of the rows of one source, method and attention together, and the mean and largest error."""
    groups: dict[tuple[str, str, str], list[Compared]] = defaultdict(list)
    for one in rows:
        source = " ".join(one.row["source"].split()[:2])
        groups[source, one.row["method"], one.row["attention"]].append(one)
    print("\n| source | method | attention | rows | mean error | largest | of |")
    print("|---|---|---|---:|---:|---:|---|")
    for (source, method, attention), group in groups.items():
        worst = max(group, key=_off)
        of = f"{worst.row['model'].split('/')[-1]}, {worst.row['micro_batch']} x {worst.row['sequence_length']}"
        mean = f"{len(group)} | {_mean(group):.1%}"
        print(f"| {source} | {method} | {attention or '-'} | {mean} | {worst.error:+.1%} | {of} |")
    if rows:
        print(f"\n{len(rows)} rows: mean error {_mean(rows):.1%}, largest {max(map(_off, rows)):.1%}\n")


def _off(one: Compared) -> float:
    return abs(one.error or 0.0)


def _mean(rows: list[Compared]) -> float:
    return sum(map(_off, rows)) / len(rows)


def measured() -> list[tuple[str, int, int, str]]:
    """Name, predicted and measured bytes, and the fullest moment, of each setting."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")
        _write_rows(work)
        for name, options in SETTINGS.items():
            sets = [part for option in options.split() for part in ("--set", option)]
            plan = _lorakit(work, "plan", "recipe.yaml", *sets)
            _lorakit(work, "train", "recipe.yaml", *sets, "--output", "run", "--overwrite")
            peak = json.loads((work / "run/manifest.json").read_text(encoding="utf-8"))["result"]["peak_memory"]
            memory = plan["memory"]["longest"]
            found.append((name, memory["total"], peak, memory["moment"]))
            print(f"{name}: {memory['total'] / peak - 1:+.1%}", file=sys.stderr)
    return found


def print_measured(rows: list[tuple[str, int, int, str]]) -> None:
    """A Markdown table of predicted and measured peaks."""
    print("| SmolLM2-135M here | predicted GB | measured GB | error | peak at |\n|---|---:|---:|---:|---|")
    for name, predicted, peak, moment in rows:
        print(f"| {name} | {predicted / 1e9:.2f} | {peak / 1e9:.2f} | {predicted / peak - 1:+.1%} | {moment} |")
    errors = [abs(predicted / peak - 1) for _, predicted, peak, _ in rows]
    print(f"\n{len(errors)} settings: mean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}")


def _write_rows(folder: Path) -> None:
    """Questions and answers of random words, all of one length a file."""
    chance = random.Random(1)
    words = [word for word in _TEXTS.read_text(encoding="utf-8").split() if word.isalpha()]
    for count in WORDS:
        halves = [[" ".join(chance.choices(words, k=count // 2)) for _ in range(2)] for _ in range(64)]
        rows = [{"messages": [_said("user", one), _said("assistant", two)]} for one, two in halves]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"rows{count}.jsonl").write_text(lines, encoding="utf-8")


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _lorakit(folder: Path, *arguments: str) -> Any:
    command = [sys.executable, "-m", "lorakit", *arguments, "--json", "--quiet"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if not done.stdout:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
