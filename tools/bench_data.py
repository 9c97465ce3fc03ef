"""Preparing rows, lorakit against TRL: the same 50,000 conversations read, rendered, tokenized, masked and stored.

Each preparation runs in a process of its own with all processors; what is timed is the preparation alone, without
imports. TRL makes masks only where the chat template has {% generation %} marks, so it is given the model's template
with these marks; that both train the same tokens is checked. It is timed without masks too.

    python tools/bench_data.py [--rows 50000] [--json FILE]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lorakit.console import result_table

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/debian-json/recipe.yaml"
MARKED = """\
{%- for m in messages -%}
  {%- if loop.first and m.role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
  {%- endif -%}
  {%- if m.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}{% generation %}{{- m.content + '<|im_end|>' -}}{% endgeneration %}{{- '\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}"""
PREPARATIONS = {
    "lorakit": "lorakit, first start",
    "lorakit again": "lorakit, from its cache",
    "trl": "trl, masks by {% generation %}",
    "trl without masks": "trl, every token trained",
}


def main() -> None:
    """Run each preparation, print the table and the ratios, and leave it as JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", choices=PREPARATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(prepare(options.one, options.data)))
        return
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as name:
        data = Path(name) / "rows.jsonl"
        write_rows(data, options.rows)
        figures = {one: in_its_own_process(one, data) for one in PREPARATIONS}
    show(figures, options.rows)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, count: int) -> None:
    """Conversations of one to three questions and answers, made of the rows of debian-json."""
    source = (ROOT / "recipes/debian-json/train.jsonl").read_text(encoding="utf-8").splitlines()
    talks = [json.loads(line)["messages"] for line in source]
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            talk = [message for _ in range(chance.choice((1, 1, 2, 3))) for message in chance.choice(talks)]
            first = {**talk[0], "content": f"{number}: {talk[0]['content']}"}
            file.write(json.dumps({"messages": [first, *talk[1:]]}) + "\n")


def in_its_own_process(one: str, data: Path) -> dict[str, Any]:
    """What `prepare` measures, in a new process."""
    cache = data.with_name("cache")
    converted, ours = Path.home() / ".cache/lorakit", cache / "lorakit"
    ours.mkdir(parents=True, exist_ok=True)
    for folder in ("converted", "carried"):
        source = Path(os.environ.get("LORAKIT_CACHE", converted)) / folder
        if source.is_dir() and not (ours / folder).exists():
            (ours / folder).symlink_to(source.resolve())
    environment = os.environ | {
        "LORAKIT_CACHE": str(ours),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache / one.replace(" ", "-")),
    }
    command = [sys.executable, __file__, "--one", one, "--data", str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{one} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(one: str, data: Path) -> dict[str, Any]:
    """Seconds of one preparation, and what it made."""
    return with_lorakit(data) if one.startswith("lorakit") else with_trl(data, masks=one == "trl")


def with_lorakit(data: Path) -> dict[str, Any]:
    """As `lorakit train` prepares its rows."""
    from lorakit.data.examples import examples_of
    from lorakit.plan.prepare import open_template
    from lorakit.progress import Silent
    from lorakit.recipe.load import load

    recipe = load(RECIPE, [f"data.train={data}", "data.eval=null", "data.max_length=1024"]).recipe
    _, template = open_template(recipe, Silent())
    begin = time.perf_counter()
    examples, _ = examples_of(recipe.data, template, Silent())
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "rows": len(examples.rows), "trained_tokens": examples.report.trained_tokens}


def with_trl(data: Path, masks: bool) -> dict[str, Any]:
    """As `trl sft` prepares them, with as many processes as there are processors; the model is a tiny one."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from lorakit.plan.prepare import open_template
    from lorakit.progress import Silent
    from lorakit.recipe.load import load

    _, template = open_template(load(RECIPE).recipe, Silent())
    tokenizer = template.tokenizer
    if masks:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        plain = tokenizer.apply_chat_template(talk, tokenize=False)
        tokenizer.chat_template = MARKED
        if tokenizer.apply_chat_template(talk, tokenize=False) != plain:
            raise SystemExit("the marked template is not the model's")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    processes = len(os.sched_getaffinity(0))
    arguments = SFTConfig(
        output_dir=str(data.with_name("trl")),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=1024,
        dataset_num_proc=processes,
        assistant_only_loss=masks,
    )
    begin = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(data), split="train")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - begin
    trained = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
    return {"seconds": seconds, "rows": len(trainer.train_dataset), "trained_tokens": trained}


def show(figures: dict[str, dict[str, Any]], count: int) -> None:
    """The table and the ratios."""
    rows = [
        [
            label,
            f"{figures[one]['seconds']:.2f}",
            f"{count / figures[one]['seconds']:,.0f}",
            f"{figures[one]['trained_tokens']:,}",
        ]
        for one, label in PREPARATIONS.items()
    ]
    result_table(f"{count:,} conversations prepared", ["", "seconds", "rows/s", "trained tokens"], rows)
    first, again, trl = (figures[one]["seconds"] for one in ("lorakit", "lorakit again", "trl"))
    print(
        f"lorakit prepares {trl / first:.1f} times the rows a second of trl with masks, "
        f"{figures['trl without masks']['seconds'] / first:.1f} times those of trl without"
    )
    print(f"the second start is {first / again:.0f} times faster than the first")
    same = figures["lorakit"]["trained_tokens"] == figures["trl"]["trained_tokens"]
    print(f"both train {'the same number of tokens' if same else 'DIFFERENT NUMBERS OF TOKENS'}")


if __name__ == "__main__":
    main()
