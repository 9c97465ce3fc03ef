"""A base without a chat template trains documents and tokens; only conversations need one."""

import json
import shutil

import pytest
from conftest import rows_of, write_rows

from lorakit.data.chat_template import ChatTemplate, NoChatTemplate
from lorakit.model.resolve import resolve_base
from lorakit.model.tokenizer import load_tokenizer
from lorakit.progress import Silent


@pytest.fixture
def bare(tiny_base, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_documents_are_trained_scored_and_merged_without_a_chat_template(recipe_file, lorakit, bare, tmp_path):
    rows = [{"text": " ".join(message["content"] for message in row["messages"])} for row in rows_of(30)]
    write_rows(tmp_path / "train.jsonl", rows[:22])
    write_rows(tmp_path / "eval.jsonl", rows[22:])
    recipe = recipe_file(model={"base": str(bare)}, train={"epochs": ..., "steps": 2, "eval_every": 2, "save_every": 2})
    for command in (
        ["data", recipe, "--show", 0],
        ["plan", recipe],
        ["train", recipe, "--output", "run"],
        ["eval", "run"],
        ["eval", "base", "run", "--data", "eval.jsonl"],
        ["eval", bare, "--data", "eval.jsonl"],
        ["merge", "run"],
    ):
        code, _, told = lorakit(*command)
        assert code == 0, (command, told)
    (tmp_path / "questions.txt").write_text("Who are you?\n")
    code, _, told = lorakit("rate", "sheet", "run", "--output", "sheet", "--questions", "questions.txt")
    assert code == 2 and ": has no chat template. Leave it out" in told


def test_tokens_are_trained_without_a_chat_template(recipe_file, lorakit, bare, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"input_ids": [5, 6, 7 + at, 2]} for at in range(6)])
    code, _, told = lorakit("data", recipe_file(model={"base": str(bare)}, data={"eval": ...}), "--show", 0)
    assert code == 0, told


def test_conversations_without_a_chat_template_are_told_what_they_need(recipe_file, lorakit, bare):
    code, _, told = lorakit("data", recipe_file(model={"base": str(bare)}))
    assert code == 2 and "no chat template" in told and "model.chat_template" in told
    tokenizer = load_tokenizer(resolve_base(str(bare), "main", Silent()), None)
    with pytest.raises(NoChatTemplate):
        ChatTemplate(tokenizer).write([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("place", ["the key", "files"])
def test_named_templates_without_a_default_are_told_by_name_and_texts_need_none(
    recipe_file, lorakit, bare, tmp_path, place
):
    named = {"rag": "{{ messages }}", "tool_use": "{{ messages }}"}
    if place == "files":
        (bare / "additional_chat_templates").mkdir()
        for name, template in named.items():
            (bare / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    else:
        config = json.loads((bare / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
        (bare / "tokenizer_config.json").write_text(json.dumps(config))
    recipe = recipe_file(model={"base": str(bare)}, train={"epochs": ..., "steps": 1})
    for command in (["data", recipe], ["train", recipe], ["eval", bare, "--data", "eval.jsonl"]):
        code, _, err = lorakit(*command)
        assert code == 2 and "has no chat template" in err, err
        assert command[0] == "eval" or "Its tokenizer has rag, tool_use, and no default" in err, err
    write_rows(tmp_path / "train.jsonl", [{"text": f"Tell me about rivers, number {at}."} for at in range(9)])
    code, _, err = lorakit("train", recipe, "--set", "data.eval=0.2", "--output", "run")
    assert code == 0, err
