"""Preparing rows, lorakit against TRL: the same rows read, rendered, tokenized, masked and stored.

Each preparation runs in a process of its own with all processors; what is timed is the preparation alone, without
imports. Three kinds of rows:

- one turn, as `prompt` and `completion`: TRL masks the prompt by itself, with any chat template
- one to three turns, as `messages`: TRL masks where the template has {% generation %} marks, so it is given the model's
  template with these marks
- the same, of about 2 KB a row: there the tokenizer, which is the same, takes most of the time of both

That both train the same number of tokens is checked (in the first case TRL trains the line break after the last token
of an answer as well, one token a row). The rows are made of those of debian-json.

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
CASES = {"one turn": 1.0, "one to three turns": 1.0, "2 KB a row": 0.2}
"""Each kind of rows, and its share of `--rows`."""
PREPARATIONS = ("lorakit", "lorakit again", "trl")


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
    figures = {}
    for case, share in CASES.items():
        with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as name:
            data = Path(name) / "rows.jsonl"
            write_rows(data, case, round(share * options.rows))
            figures[case] = {one: in_its_own_process(one, data) for one in PREPARATIONS}
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, case: str, count: int) -> None:
    """Rows of one kind, no two of them the same."""
    source = (ROOT / "recipes/debian-json/train.jsonl").read_text(encoding="utf-8").splitlines()
    talks = [json.loads(line)["messages"] for line in source]
    words = sorted({word for talk in talks for word in talk[0]["content"].split()})
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = 1 if case == "one turn" else chance.choice((1, 1, 2, 3))
            talk = [dict(message) for _ in range(turns) for message in chance.choice(talks)]
            talk[0]["content"] = f"{number}: {talk[0]['content']}"
            if case == "2 KB a row":
                for message in talk:
                    message["content"] += " " + " ".join(chance.choices(words, k=240 // len(talk)))
            row = {"prompt": talk[:-1], "completion": talk[-1:]} if case == "one turn" else {"messages": talk}
            file.write(json.dumps(row) + "\n")


def in_its_own_process(one: str, data: Path) -> dict[str, Any]:
    """What `prepare` measures, in a new process."""
    cache = data.with_name("cache")
    ours = cache / "lorakit"
    ours.mkdir(parents=True, exist_ok=True)
    for folder in ("converted", "carried"):
        source = Path(os.environ.get("LORAKIT_CACHE", Path.home() / ".cache/lorakit")) / folder
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
    return with_lorakit(data) if one.startswith("lorakit") else with_trl(data)


def with_lorakit(data: Path) -> dict[str, Any]:
    """As `lorakit train` prepares its rows."""
    from lorakit.data.examples import examples_of
    from lorakit.prepare import open_template
    from lorakit.progress import Silent
    from lorakit.recipe.load import load

    recipe = load(RECIPE, [f"data.train={data}", "data.eval=null", "data.max_length=1024"]).recipe
    _, template = open_template(recipe, Silent())
    begin = time.perf_counter()
    examples, _ = examples_of(recipe.data, template, Silent())
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "rows": len(examples.rows), "trained_tokens": examples.report.trained_tokens}


def with_trl(data: Path) -> dict[str, Any]:
    """As `trl sft` prepares them, with as many processes as there are processors; the model is a tiny one."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from lorakit.prepare import open_template
    from lorakit.progress import Silent
    from lorakit.recipe.load import load

    _, template = open_template(load(RECIPE).recipe, Silent())
    tokenizer = template.tokenizer
    marks = '"messages"' in data.open(encoding="utf-8").readline()
    if marks:
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
        assistant_only_loss=marks,
    )
    begin = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(data), split="train")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - begin
    trained = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
    return {"seconds": seconds, "rows": len(trainer.train_dataset), "trained_tokens": trained}


def show(figures: dict[str, dict[str, Any]]) -> None:
    """The table, the ratios, and whether both trained the same."""
    rows = []
    for case, found in figures.items():
        first, again, trl = (found[one]["seconds"] for one in PREPARATIONS)
        count = found["lorakit"]["rows"]
        rows.append(
            [
                f"{case}, {count:,} rows",
                f"{count / first:,.0f}",
                f"{count / trl:,.0f}",
                f"{trl / first:.1f}",
                f"{again:.2f}",
                f"{first / again:.0f}",
            ]
        )
        more = found["trl"]["trained_tokens"] - found["lorakit"]["trained_tokens"]
        if more == count and case == "one turn":
            print(f"{case}: trl also trains the line break after each answer's last token")
        elif more:
            print(f"{case}: DIFFERENT NUMBERS OF TRAINED TOKENS: {found}")
    columns = ["", "lorakit rows/s", "trl rows/s", "ratio", "second start, s", "times faster"]
    result_table("rows prepared: read, rendered, tokenized, masked, stored", columns, rows)


if __name__ == "__main__":
    main()
