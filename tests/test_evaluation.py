"""Promises of `lorakit eval`."""

import json
import math

import pytest
import torch
from runs_of_tests import run_recipe

from lorakit.errors import UserError
from lorakit.evaluate.generate import generate, until_stop
from lorakit.evaluate.metrics import exact_match, json_fields, json_valid
from lorakit.evaluate.run import evaluate, metric_scores, reference_of
from lorakit.plan.prepare import reopen_run
from lorakit.progress import Silent


def test_metrics_on_hand_made_cases():
    assert exact_match(" a b\n", "a b") == {"": 1.0}
    assert exact_match("a  b", "a b") == {"": 0.0}
    assert json_valid('{"a": 1}', "") == {"": 1.0}
    for broken in ("", "{'a': 1}", '{"a": 1} and more', '{"a": NaN}', "[" * 100000):
        assert json_valid(broken, "") == {"": 0.0}
    reference = '{"a": 1, "b": "x", "c": true}'
    assert json_fields('{"a": 1.0, "b": "y", "c": true}', reference) == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert json_fields('{"a": true, "c": 1}', reference) == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert json_fields("no json", reference) == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert json_fields("[1]", "[1]") == {}


def test_metric_scores_are_means_over_rows():
    scores = metric_scores(["exact-match", "json-fields"], ['{"a": 1}', "x"], ['{"a": 1}', '{"a": 2}'])
    assert scores == {"exact-match": 0.5, "json-fields.a": 0.5}


def test_base_and_adapter_are_scored_in_one_load_and_kept_with_every_answer(recipe_file, tmp_path):
    run_recipe(recipe_file(), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    scored, path = evaluate(run, prepared, Silent())
    base, adapter = scored
    assert (base.name, adapter.name) == ("base", "adapter")
    assert adapter.scores["loss"] < base.scores["loss"]
    assert adapter.scores["perplexity"] == pytest.approx(math.exp(adapter.scores["loss"]))
    assert adapter.scores["loss"] == pytest.approx(run.read_manifest()["result"]["eval_loss"], rel=1e-4)
    assert {"exact-match", "json-valid", "json-fields.topic", "json-fields.number"} <= base.scores.keys()
    facts = json.loads(path.read_text())
    assert facts["models"]["adapter"] == adapter.scores
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == facts["rows"] == 10
    assert json.loads(lines[0]["reference"]).keys() == {"topic", "number"}
    assert lines[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert [line["adapter"] for line in lines] == adapter.answers


def test_base_scores_are_those_of_the_untouched_base(recipe_file, tmp_path, tiny_base):
    from transformers import AutoModelForCausalLM

    from lorakit.evaluate.run import held_out_loss

    run_recipe(recipe_file(evaluate={"metrics": []}), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    (base, _), _ = evaluate(run, prepared, Silent())
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert base.scores["loss"] == pytest.approx(held_out_loss(plain, list(prepared.held_out.rows), 0, "", Silent()))


def test_batched_greedy_answers_are_those_of_single_prompts(tiny_base, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    prompts = [tokenizer(text)["input_ids"] for text in ("apples", "rivers and lamps and clouds", "letters " * 9)]
    together = generate(model, tokenizer, prompts, [2], 12, 0, "", Silent())
    for prompt, answer in zip(prompts, together, strict=True):
        with torch.no_grad():
            alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2)
        tokens = until_stop(alone[0, len(prompt) :].tolist(), [2])
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_reference_is_the_last_answer_without_its_stop_token(recipe_file, tmp_path):
    from lorakit.plan.prepare import prepare_run
    from lorakit.recipe.load import load

    prepared = prepare_run(load(recipe_file()).recipe, Silent())
    row = prepared.held_out.rows[0]
    assert reference_of(row, prepared.tokenizer, prepared.stop_ids) == '{"topic": "horses", "number": 0}'


def test_rows_limits_what_is_scored(recipe_file, tmp_path):
    run_recipe(recipe_file(evaluate={"rows": 3}), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    scored, _ = evaluate(run, prepared, Silent())
    assert len(scored[0].answers) == 3


def test_an_evaluation_without_held_out_rows_says_what_to_write(recipe_file, tmp_path):
    run_recipe(recipe_file(data={"eval": None}), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    with pytest.raises(UserError, match=r"data\.eval"):
        evaluate(run, prepared, Silent())
    with pytest.raises(UserError, match="is no run's folder"):
        reopen_run(tmp_path, Silent())
