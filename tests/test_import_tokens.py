"""Imported recipes train the tokens that the tool trains, by what its documentation and code say."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import rows_of, write_rows
from runs_of_tests import run_recipe

from lorakit.atomic_io import sha256_of
from lorakit.data.examples import rules_of
from lorakit.data.formats import parse_record
from lorakit.data.sources import sources_of
from lorakit.data.survey import explain_row
from lorakit.prepare import open_template
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.share.importing import import_config
from lorakit.share.importing.prompts import ALPACA, ALPACA_CHAT, JOINED, PlainPrompt, template_format
from lorakit.share.importing.source import ForeignConfig

_IGNORED = -100
_TRAINING = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "micro_batch_size": 1,
    "learning_rate": 1e-4,
    "sequence_len": 512,
}
ALPACA_ROWS = [
    {"instruction": f"Add {n} and {{x}}.", "input": "" if n % 2 else f"Think of {n}.", "output": f"It is {n}{{}}."}
    for n in range(10)
]


def examples_of(folder: Path, tree: dict[str, Any], rows: int) -> list[tuple[list[int], list[int]]]:
    """The token ids and labels of the first rows of an imported config."""
    result = import_config(ForeignConfig("config.yml", tree, folder), folder / "recipe.yaml")
    assert result.text and not result.refused, [vars(one) for one in result.refused] or result.reason
    for file, text in {**result.files, folder / "recipe.yaml": result.text}.items():
        file.write_text(text, encoding="utf-8")
    recipe = load(folder / "recipe.yaml").recipe
    _, template = open_template(recipe, Silent())
    sources, rules = sources_of(recipe.data, recipe.data.train), rules_of(recipe.data, None, survey=False)
    found = [explain_row(f"rows.jsonl:{row}", sources, template, rules) for row in range(1, rows + 1)]
    assert all(len(examples) == 1 for _, examples, _ in found), [reasons for _, _, reasons in found]
    return [(list(one["input_ids"]), list(one["labels"])) for _, (one,), _ in found]


def test_axolotls_alpaca_rows_have_its_prompt_and_train_the_output_and_the_end(tmp_path, tiny_base, tokenizer):
    write_rows(tmp_path / "rows.jsonl", ALPACA_ROWS)
    datasets = [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}]
    tree = {**_TRAINING, "base_model": str(tiny_base), "datasets": datasets}
    for row, (ids, labels) in zip(ALPACA_ROWS, examples_of(tmp_path, tree, 10), strict=True):
        context = ", paired with an input that provides further context" if row["input"] else ""
        prompt = (
            f"Below is an instruction that describes a task{context}. Write a response that appropriately completes"
        )
        prompt += f" the request.\n\n### Instruction:\n{row['instruction']}\n\n"
        prompt += (f"### Input:\n{row['input']}\n\n" if row["input"] else "") + "### Response:\n"
        question, answer = tokenizer(prompt)["input_ids"], tokenizer(row["output"])["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        assert (ids, labels) == ([*question, *answer], [_IGNORED] * len(question) + answer)


_BY_HAND = """
model: {base: BASE}
adapter: {rank: 4, alpha: 8, dropout: 0.05}
data: {train: rows.jsonl, format: messages, max_length: 512}
train: {epochs: 1, batch_size: 4, learning_rate: 1.0e-4, schedule: linear, warmup: 2, weight_decay: 0.1, seed: 7}
output: {dir: by-hand}
"""


def test_an_imported_recipe_trains_the_adapter_of_one_written_by_hand_bit_for_bit(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows_of(24))
    there = {"lora_dropout": 0.05, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 1}
    there |= {"lr_scheduler": "linear", "warmup_steps": 2, "weight_decay": 0.1, "seed": 7, "optimizer": "adamw_torch"}
    datasets = [{"path": "rows.jsonl", "type": "chat_template"}]
    tree = {**_TRAINING, **there, "base_model": str(tiny_base), "datasets": datasets}
    imported = import_config(ForeignConfig("config.yml", tree, tmp_path), tmp_path / "imported.yaml")
    assert imported.text and not imported.refused, [vars(one) for one in imported.refused]
    (tmp_path / "imported.yaml").write_text(imported.text, encoding="utf-8")
    (tmp_path / "by-hand.yaml").write_text(_BY_HAND.replace("BASE", str(tiny_base)), encoding="utf-8")
    one, other = (run_recipe(tmp_path / f"{name}.yaml", tmp_path / name)[0] for name in ("imported", "by-hand"))
    assert sha256_of(one.adapter / "adapter_model.safetensors") == sha256_of(
        other.adapter / "adapter_model.safetensors"
    )


def test_llama_factorys_rows_train_the_answers_of_all_turns(tmp_path, tiny_base, tokenizer):
    rows = [
        {"conversations": [{"from": "human", "value": m["content"]} for m in row["messages"]]} for row in rows_of(10)
    ]
    for row in rows:
        row["conversations"][1]["from"] = "gpt"
        row["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Nothing."}]
    write_rows(tmp_path / "rows.jsonl", rows)
    info = {"mine": {"file_name": "rows.jsonl", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    tree = {"model_name_or_path": str(tiny_base), "stage": "sft", "dataset": "mine", "dataset_dir": str(tmp_path)}
    for row, (ids, labels) in zip(rows, examples_of(tmp_path, tree, 10), strict=True):
        expected: tuple[list[int], list[int]] = ([], [])
        for turn in row["conversations"]:
            role = {"human": "user", "gpt": "assistant"}[turn["from"]]
            head, body = (
                tokenizer(text)["input_ids"] for text in (f"<|im_start|>{role}\n", f"{turn['value']}<|im_end|>")
            )
            after = tokenizer("\n")["input_ids"]
            expected[0].extend([*head, *body, *after])
            trained = body if role == "assistant" else [_IGNORED] * len(body)
            expected[1].extend([*[_IGNORED] * len(head), *trained, *[_IGNORED] * len(after)])
        assert tokenizer.decode(ids).strip() == tokenizer.decode(expected[0]).strip()
        assert [label for label in labels if label != _IGNORED] == [one for one in expected[1] if one != _IGNORED]


@pytest.mark.parametrize(
    ("prompt", "row", "written"),
    [
        (JOINED, {"instruction": "a", "input": "b", "output": "c"}, "a\nb"),
        (JOINED, {"instruction": "a{input}", "input": "", "output": "c"}, "a{input}"),
        (JOINED, {"instruction": "", "input": "b", "output": "c"}, "b"),
        (JOINED, {"instruction": "{{ x }}", "output": "c"}, "{{ x }}"),
        (ALPACA_CHAT, {"instruction": "a", "input": None, "output": "c"}, None),
        (ALPACA, {"instruction": "a", "input": "b\n", "output": "c"}, None),
        (
            PlainPrompt(
                "\n{instruction} {input}\n",
                "\n{instruction}\n",
                columns={"instruction": "my q", "input": "i", "output": "o"},
            ),
            {"my q": "a", "i": "", "o": "c"},
            "\na\n",
        ),
        (
            PlainPrompt(
                "",
                "{{%{instruction}%}}\n",
                "<{system}>",
                "<none>\n",
                {"instruction": "q", "system": "s", "output": "o"},
            ),
            {"q": "a", "o": "c"},
            "<none>\n{%a%}\n",
        ),
        (
            PlainPrompt(
                "", "{instruction}", "<{system}>\n", "<none>", {"instruction": "q", "system": "s", "output": "o"}
            ),
            {"q": "a", "s": "b", "o": "c"},
            "<b>\na",
        ),
        (
            PlainPrompt(
                "", "{instruction}", "<{system}>", "<none>", {"instruction": "q", "system": "s", "output": "o"}
            ),
            {"q": "a", "s": "", "o": "c"},
            "a",
        ),
    ],
)
def test_a_prompt_of_plain_text_is_written_as_pythons_format_writes_it(tmp_path, prompt, row, written):
    path = tmp_path / "x.yaml"
    (tmp_path / "rows.jsonl").touch()
    data = {"train": "rows.jsonl", "format": template_format(prompt)}
    path.write_text(json.dumps({"model": {"base": "org/x"}, "data": data}), encoding="utf-8")
    settings = load(path).recipe.data.format.template
    if written is None:
        text = prompt.with_input if row.get("input") else prompt.without_input
        written = text.format(**{name: row[column] for name, column in prompt.columns.items()})
    messages = parse_record("template", settings, row).messages
    assert [message["content"] for message in messages] == [written, "c"]
