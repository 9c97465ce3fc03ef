"""Prompting as a rival: the base with a system text and examples is scored on the same rows, and sees none of them."""

import copy
import io
import json
from dataclasses import replace

import pytest
from eval_runs import make_run
from recipe_files import SMALL, errors, loaded

from lorakit.data.rows import IGNORED
from lorakit.errors import UserError
from lorakit.evaluate.models import Prompting, models_of_run
from lorakit.evaluate.prompting import add_prompted_model, add_prompts, chosen_prompting
from lorakit.evaluate.rendering import render_for_models
from lorakit.evaluate.report import evaluation_document
from lorakit.evaluate.run import default_settings, score_models
from lorakit.prepare import reopen_run
from lorakit.progress import Silent


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    """Its held-out rows are a share of the same file."""
    return make_run(tmp_path_factory.mktemp("run"), tiny_base, data={"eval": 0.3}, evaluate={"max_new_tokens": 4})


@pytest.fixture(scope="module")
def prepared(run):
    return reopen_run(run.folder, Silent())[1]


def prompted_rows(run, prepared, prompting):
    """The plain rows, and those of the prompted base."""
    model_set = add_prompted_model(models_of_run(run, prepared), prompting)
    assert [spec.name for spec in model_set.specs] == ["base", f"base + {prompting}", "adapter"]
    plain, _ = render_for_models(model_set, None, Silent())
    rendered = add_prompts(plain, model_set, None, Silent())
    assert rendered[0] is plain[0] and rendered[2] is plain[2]
    return plain[0], rendered[1]


def text_of(rendered, tokens):
    return rendered.tokenizer.decode(tokens)


@pytest.mark.parametrize("choose", ["seed", "similar"])
def test_examples_are_training_rows_before_the_rows_own_messages(run, prepared, choose):
    plain, prompted = prompted_rows(run, prepared, Prompting(3, choose))
    training = [text_of(plain, row["input_ids"]) for row in prepared.rows.train.rows]
    held_out = [text_of(plain, prompt) for prompt in plain.prompts]
    for own, prompt in zip(held_out, (text_of(plain, one) for one in prompted.prompts), strict=True):
        assert prompt.endswith(own)
        examples = prompt.removesuffix(own)
        assert sum(examples.count(row) for row in training) == 3 and examples.count("<|im_start|>assistant") == 3
        assert not any(other in examples for other in held_out)


def test_only_the_answer_of_the_row_itself_is_scored(run, prepared):
    plain, prompted = prompted_rows(run, prepared, Prompting(2))
    assert prompted.references == plain.references
    for before, after in zip(plain.rows, prompted.rows, strict=True):
        answer = before["input_ids"][before["answer"] :]
        assert after["input_ids"][after["answer"] :] == answer
        assert [token for token in after["labels"] if token != IGNORED] == [
            token for token in before["labels"] if token != IGNORED
        ]


def test_a_seed_gives_all_rows_the_same_examples_and_another_seed_others(run, prepared):
    plain, first = prompted_rows(run, prepared, Prompting(2, seed=1))
    starts = {
        text_of(plain, prompt).removesuffix(text_of(plain, own))
        for own, prompt in zip(plain.prompts, first.prompts, strict=True)
    }
    assert len(starts) == 1
    assert prompted_rows(run, prepared, Prompting(2, seed=2))[1].prompts != first.prompts


def test_the_nearest_example_is_the_last_one(run, prepared):
    plain, prompted = prompted_rows(run, prepared, Prompting(3, "similar"))
    for own, prompt in zip(plain.prompts, prompted.prompts, strict=True):
        topic = text_of(plain, own).partition("about ")[2].split()[0].rstrip(",")
        nearest = text_of(plain, prompt).removesuffix(text_of(plain, own)).rpartition("<|im_start|>user")[2]
        assert topic in nearest


def test_a_system_text_takes_the_place_of_the_rows_own(run, prepared):
    plain, prompted = prompted_rows(run, prepared, Prompting(1, system="Answer in JSON."))
    for own, prompt in zip(plain.prompts, prompted.prompts, strict=True):
        text = text_of(plain, prompt)
        assert text.startswith("<|im_start|>system\nAnswer in JSON.<|im_end|>\n<|im_start|>user")
        assert text.count("<|im_start|>system") == 1 and text.endswith(text_of(plain, own))


def test_the_rival_is_in_the_table_with_what_its_answers_cost(run, prepared):
    model_set = add_prompted_model(models_of_run(run, prepared), Prompting(4))
    evaluation = score_models(model_set, None, default_settings(prepared), Silent())
    document = evaluation_document(evaluation)
    base, prompted, adapter = (document["models"][name]["costs"] for name in ("base", "base + 4 examples", "adapter"))
    assert base["prompt_tokens"] == adapter["prompt_tokens"] < prompted["prompt_tokens"]
    assert all(one["seconds"] > 0 and 0 <= one["answer_tokens"] <= 4 for one in (base, prompted, adapter))
    (one,) = document["prompting"]
    assert (one["model"], one["against"]) == ("adapter", "base + 4 examples")
    assert one["prompt_tokens_saved"] == pytest.approx(prompted["prompt_tokens"] - adapter["prompt_tokens"])
    assert "adapter against base + 4 examples: exact-match" in one["in_words"]
    assert "loss" in document["comparisons"][0]["scores"]  # of the same trained tokens
    again = evaluation_document(score_models(model_set, None, default_settings(prepared), Silent()))
    assert again["models"]["base"]["costs"] == base  # from the cache, seconds too


def test_a_recipe_is_scored_with_a_prompt_before_anything_is_trained(recipe_file, lorakit_eval):
    recipe = recipe_file()
    code, out, err = lorakit_eval(recipe, "--few-shot", "2", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert list(document["models"]) == ["base", "base + 2 examples"] and document["file"] is None
    assert (
        document["rows"]["source"] == f"the held-out rows of {recipe}" and document["settings"]["max_new_tokens"] == 8
    )
    code, _, err = lorakit_eval(recipe, "base")
    assert code == 2 and "Give it alone" in err


def test_the_base_of_a_recipe_chats(recipe_file, lorakit, monkeypatch):
    recipe = recipe_file()
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
    code, out, err = lorakit("chat", recipe, "--max-new-tokens", "2", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["current"] == "base" and len(document["answers"]) == 1


def test_a_run_without_a_rival_says_how_to_measure_one(tmp_path, tiny_base, lorakit_eval):
    own = make_run(tmp_path / "own", tiny_base, train={"steps": 1}, evaluate={"max_new_tokens": 2})
    command = f"lorakit eval {own.folder} --few-shot 5"
    code, out, _ = lorakit_eval(own.folder)
    assert code == 0 and out.count(command) == 1
    assert command not in lorakit_eval(own.folder, "--quiet")[1]
    document = json.loads(lorakit_eval(own.folder, "--json")[1])
    assert [command in note for note in document["notes"]] == [True]
    assert command not in lorakit_eval(own.folder, "--few-shot", "5")[1]
    assert command not in lorakit_eval(own.folder)[1]  # it has been measured


def test_more_examples_than_training_rows_are_refused(run, prepared, lorakit_eval):
    code, _, err = lorakit_eval(run.folder, "--few-shot", "50")
    assert code == 2 and "50 examples are asked for, and the training rows have" in err


def test_a_training_row_that_is_scored_is_no_example(run, prepared, lorakit_eval, tmp_path):
    model_set = add_prompted_model(models_of_run(run, prepared), Prompting(1, "similar"))
    rows = (run.folder.parent / "train.jsonl").read_text().splitlines()
    (tmp_path / "known.jsonl").write_text("\n".join(rows[:6]) + "\n")
    plain, _ = render_for_models(model_set, tmp_path / "known.jsonl", Silent())
    prompted = add_prompts(plain, model_set, tmp_path / "known.jsonl", Silent())[1]
    for own, prompt in zip(plain[1].prompts, prompted.prompts, strict=True):
        text = text_of(prompted, prompt)
        assert text.count("<|im_start|>user") == 2 and text.count(text_of(plain[1], own)) == 1


def test_every_turn_is_asked_after_the_same_examples(tmp_path, tiny_base):
    rows = tmp_path / "talks.jsonl"
    turns = [("user", "Tell me about apples, number {}."), ("assistant", "{}")] * 3
    talks = [
        {"messages": [{"role": role, "content": text.format(10 * at + n)} for n, (role, text) in enumerate(turns)]}
        for at in range(20)
    ]
    rows.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    run = make_run(tmp_path / "talks", tiny_base, data={"train": str(rows), "eval": 0.3}, train={"steps": 1})
    prepared = reopen_run(run.folder, Silent())[1]
    model_set = add_prompted_model(models_of_run(run, prepared), Prompting(1))
    plain, _ = render_for_models(model_set, None, Silent())
    (last,) = {id(one): one for one in plain}.values()
    after_last = add_prompts(plain, model_set, None, Silent())[1]
    plain = [replace(last, turns="all")] * 3
    prompted = add_prompts(plain, model_set, None, Silent())[1]
    assert prompted.rows == after_last.rows  # the loss is of the same turns
    assert prompted.references == plain[0].references and len(prompted.prompts) == 3 * len(prompted.rows)
    for own, prompt in zip(plain[0].prompts, prompted.prompts, strict=True):
        assert prompt[-len(own) :] == own and len(prompt) > len(own)


def test_a_template_without_a_system_role_says_so(run, prepared, tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = copy.deepcopy(prepared.tokenizer)
    tokenizer.chat_template = refusing + tokenizer.chat_template
    own = replace(prepared, tokenizer=tokenizer)
    model_set = add_prompted_model(models_of_run(run, own), Prompting(system="Be brief."))
    plain, _ = render_for_models(model_set, None, Silent())
    with pytest.raises(UserError, match=r"refuses every such prompt: .*System role not supported"):
        add_prompts(plain, model_set, None, Silent())


def test_options_go_before_the_recipe_and_zero_switches_off(run, tmp_path, lorakit_eval):
    system = tmp_path / "system.txt"
    system.write_text("Be brief.")
    code, out, err = lorakit_eval(run.folder, "--few-shot", "1", "--system-file", system, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert list(document["models"]) == ["base", "base + system text, 1 example", "adapter"]
    assert document["models"]["base + system text, 1 example"]["prompting"]["system"] == "Be brief."
    code, out, err = lorakit_eval(run.folder, "--few-shot", "1", "--few-shot-by", "similar")
    assert code == 0, err
    assert "base + 1 nearest example" in out and "what an answer costs" in out and "tokens shorter each" in out
    code, _, err = lorakit_eval(run.folder, "--few-shot-by", "similar")
    assert code == 2 and "--few-shot-by: no examples are asked for. Add --few-shot K" in err


def test_the_recipe_names_the_rival(prepared):
    recipe = prepared.recipe
    assert chosen_prompting(recipe, None, None, None) is None
    baselines = recipe.evaluate.baselines.model_copy(update={"few_shot": 5, "choose": "similar"})
    named = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"baselines": baselines})})
    assert chosen_prompting(named, None, None, None) == Prompting(5, "similar", None, recipe.train.seed)
    assert chosen_prompting(named, 0, None, None) is None
    assert chosen_prompting(named, 2, "seed", "Hi.") == Prompting(2, "seed", "Hi.", recipe.train.seed)


def test_documents_have_no_prompt_for_examples(tmp_path, tiny_base, lorakit_eval):
    rows = tmp_path / "texts.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"Rivers and lamps, number {at}, and more."}) + "\n" for at in range(20))
    )
    texts = make_run(tmp_path / "texts", tiny_base, data={"train": str(rows), "eval": 0.3}, evaluate={"metrics": []})
    code, _, err = lorakit_eval(texts.folder, "--few-shot", "1")
    assert code == 2 and "none of the rows is a conversation" in err


def test_a_system_text_is_written_once(tmp_path):
    (tmp_path / "prompt.txt").write_text("Be brief.")
    both = SMALL + "evaluate: {baselines: {system: Hi., system_file: prompt.txt}}\n"
    assert "system is there too" in " ".join(errors(tmp_path, both))
    loaded_recipe = loaded(tmp_path, SMALL + "evaluate: {baselines: {few_shot: 3, system_file: prompt.txt}}\n").recipe
    baselines = loaded_recipe.evaluate.baselines
    assert (baselines.few_shot, baselines.system, baselines.system_file) == (3, "Be brief.", None)
