"""Promises of scoring: what is measured, of whom, and that nothing is computed twice."""

import json
import math

import pytest
import torch
from eval_runs import evaluate
from runs_of_tests import run_recipe

from lorakit.data.answers import decode_answer, reference_of, until_stop
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.forward import row_losses, trained_tokens
from lorakit.evaluate.metric import row_scores
from lorakit.evaluate.metrics.json_answers import json_fields, json_valid
from lorakit.evaluate.metrics.matching import exact_match
from lorakit.model import generation
from lorakit.model.generation import greedy_answers, in_batches
from lorakit.model.loss import supervised_loss
from lorakit.prepare import reopen_run
from lorakit.progress import Silent


@pytest.fixture
def tiny_model(tiny_base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


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
    scores = row_scores(["exact-match", "json-fields"], ['{"a": 1}', "x"], ['{"a": 1}', '{"a": 2}'])
    assert {name: measure.value for name, measure in scores.items()} == {"exact-match": 0.5, "json-fields.a": 0.5}


def test_base_and_adapter_are_scored_and_kept_with_every_answer(recipe_file, tmp_path):
    run_recipe(recipe_file(), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    (base, adapter), path = evaluate(run, prepared, Silent())
    assert (base.name, adapter.name) == ("base", "adapter")
    assert adapter.scores["loss"] < base.scores["loss"]
    assert adapter.scores["perplexity"] == pytest.approx(math.exp(adapter.scores["loss"]))
    assert adapter.scores["loss"] == pytest.approx(run.read_manifest()["result"]["eval_loss"], rel=1e-4)
    assert {"exact-match", "json-valid", "json-fields.topic", "json-fields.number"} <= base.scores.keys()
    facts = json.loads(path.read_text())
    assert facts["format"] == 2
    told = facts["models"]["adapter"]["scores"]
    assert {name: score["value"] for name, score in told.items()} == adapter.scores
    assert told["loss"]["low"] < told["loss"]["value"] < told["loss"]["high"]
    (compared,) = facts["comparisons"]
    assert (compared["model"], compared["against"], compared["scores"]["loss"]["verdict"]) == (
        "adapter",
        "base",
        "better",
    )
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == facts["rows"]["count"] == 10
    assert json.loads(lines[0]["reference"]).keys() == {"topic", "number"}
    assert lines[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert [line["answers"]["adapter"] for line in lines] == adapter.answers
    nats = sum(line["loss"]["base"] * tokens for line, tokens in zip(lines, base.tokens, strict=True))
    assert nats / base.tokens.sum() == pytest.approx(base.scores["loss"])


def test_base_scores_are_those_of_the_untouched_base(recipe_file, tmp_path, tiny_model):
    run_recipe(recipe_file(evaluate={"metrics": []}), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    (base, _), _ = evaluate(run, prepared, Silent())
    rows = list(prepared.held_out.rows)
    plain = row_losses(tiny_model, rows, 0, "", Silent())
    assert base.scores["loss"] == pytest.approx(plain.sum() / trained_tokens(rows).sum())
    assert base.answers == []


def test_the_loss_of_each_row_is_the_supervised_loss_of_the_row_alone(recipe_file, tmp_path, tiny_model):
    from lorakit.data.batches import collate
    from lorakit.prepare import prepare_run
    from lorakit.recipe.load import load

    rows = list(prepare_run(load(recipe_file()).recipe, Silent()).held_out.rows)
    told: dict[int, float] = {}
    found = row_losses(tiny_model, rows, 0, "", Silent(), told.update)
    for row, nats, tokens in zip(rows, found, trained_tokens(rows), strict=True):
        with torch.no_grad():
            total, count = supervised_loss(tiny_model, **collate([row], 0))
        assert nats == pytest.approx(float(total), rel=1e-5) and tokens == count
    assert told == pytest.approx(dict(enumerate(found)))


def alone(model, prompt, tokens, stops):
    with torch.no_grad():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=stops)
    return until_stop(output[0, len(prompt) :].tolist(), stops)


def test_batched_greedy_answers_are_those_of_single_prompts(tiny_model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("apples", "rivers and lamps and clouds", "letters " * 9)]
    together = greedy_answers(tiny_model, prompts, [2], 12, 0, "", Silent())
    for prompt, answer in zip(prompts, together, strict=True):
        expected = tokenizer.decode(alone(tiny_model, prompt, 12, [2]), skip_special_tokens=True)
        assert decode_answer(answer.tokens, tokenizer) == expected


def many_prompts(tokenizer, count=24):
    return [tokenizer(f"{'and ' * (number % 5)}apples {number}")["input_ids"] for number in range(count)]


def test_a_batch_that_is_mostly_done_goes_on_smaller_to_the_same_answers(tiny_model, tokenizer, monkeypatch):
    prompts = many_prompts(tokenizer)
    plain = greedy_answers(tiny_model, prompts, [], 40, 0, "", Silent())
    said = [token for answer in plain for token in answer.tokens[17:24]]
    stops = sorted({max(set(said), key=said.count)})  # ends many answers, and not at once
    whole = [tuple(alone(tiny_model, prompt, 40, stops)) for prompt in prompts]
    sizes = []
    generates = tiny_model.generate
    monkeypatch.setattr(
        tiny_model, "generate", lambda **given: (sizes.append(len(given["input_ids"])), generates(**given))[1]
    )
    monkeypatch.setattr(generation, "_LIVE", 0.9)
    monkeypatch.setattr(generation, "_WORTHWHILE_TOKENS", 1)
    found = greedy_answers(tiny_model, prompts, stops, 40, 0, "", Silent())
    assert [answer.tokens for answer in found] == whole
    assert sizes[0] == 24 and len(sizes) > 1 and sizes[1] < 24
    assert [answer.ended for answer in found] == [len(tokens) < 40 for tokens in whole]


def test_what_the_models_own_generation_config_asks_for_does_not_hold(tiny_model, tokenizer):
    prompts = many_prompts(tokenizer, 3)
    plain = greedy_answers(tiny_model, prompts, [2], 12, 0, "", Silent())
    tiny_model.generation_config.update(do_sample=True, repetition_penalty=9.0, min_new_tokens=12, temperature=3.0)
    own = tiny_model.generation_config
    assert greedy_answers(tiny_model, prompts, [2], 12, 0, "", Silent()) == plain
    assert tiny_model.generation_config is own


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_nothing_is_lost(tiny_model, tokenizer, monkeypatch):
    prompts = many_prompts(tokenizer)
    plain = greedy_answers(tiny_model, prompts, [2], 8, 0, "", Silent())
    sizes, generates = [], tiny_model.generate

    def narrow(**given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generates(**given)

    monkeypatch.setattr(tiny_model, "generate", narrow)
    assert greedy_answers(tiny_model, prompts, [2], 8, 0, "", Silent()) == plain
    assert sizes == [24, 12, 6, 6, 6, 6]


def test_one_row_that_does_not_fit_is_an_error_and_other_faults_pass_through():
    def full(batch):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(LorakitError, match="out of memory on one row of 5 tokens"):
        in_batches([5, 3], lambda item: item, 8, 100, full)
    with pytest.raises(RuntimeError, match="shapes"):
        in_batches([5], lambda item: item, 8, 100, lambda batch: (_ for _ in ()).throw(RuntimeError("shapes")))


def test_batches_hold_items_of_like_size_within_the_tokens():
    seen = []
    in_batches([1, 9, 2, 8, 3], lambda item: item, 3, 18, lambda batch: seen.append(batch) or [])
    assert seen == [[8, 9], [1, 2, 3]]


@pytest.mark.parametrize(("rows", "batches"), [(2, [[8, 9], [2, 3], [3, 9], [1]]), (3, [[3, 8, 9], [1, 2], [3, 9]])])
def test_items_that_need_more_wait_for_others_of_their_kind(rows, batches):
    seen = []

    def work(batch):
        seen.append(batch)
        return [item for item in batch if item in (3, 9) and sum(item in one for one in seen) == 1]

    in_batches([1, 9, 2, 8, 3], lambda item: item, rows, 100, work)
    assert seen == batches


def test_no_more_items_wait_than_fit_at_once():
    seen = []
    in_batches(
        [6, 7, 8, 9], lambda item: item, 64, 18, lambda batch: seen.append(batch) or batch * (batch not in seen[:-1])
    )
    assert seen == [[8, 9], [8, 9], [6, 7], [6, 7]]


def test_a_reference_is_the_last_answer_without_its_stop_token(recipe_file):
    from lorakit.prepare import prepare_run
    from lorakit.recipe.load import load

    prepared = prepare_run(load(recipe_file()).recipe, Silent())
    row = prepared.held_out.rows[0]
    assert reference_of(row, prepared.tokenizer, prepared.stop_ids) == '{"topic": "horses", "number": 0}'


def test_rows_limits_what_is_scored(recipe_file, tmp_path):
    run_recipe(recipe_file(evaluate={"rows": 3}), tmp_path / "run")
    (base, _), path = evaluate(*reopen_run(tmp_path / "run", Silent()), Silent())
    assert len(base.answers) == len(base.tokens) == 3
    assert json.loads(path.read_text())["rows"] | {"source": ""} == {
        "source": "",
        "count": 3,
        "available": 10,
        "with_answer": 3,
        "answers": 3,
    }


def test_an_evaluation_without_held_out_rows_says_what_to_write(recipe_file, tmp_path):
    run_recipe(recipe_file(data={"eval": None}), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    with pytest.raises(UserError, match=r"data\.eval"):
        evaluate(run, prepared, Silent())
    with pytest.raises(UserError, match="not a run folder"):
        reopen_run(tmp_path, Silent())
