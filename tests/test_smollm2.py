"""The real SmolLM2-135M-Instruct, as a newcomer gets it. `make model` has fetched it; without it these tests skip."""

import json
from pathlib import Path

import pytest
import torch
from eval_runs import score
from runs_of_tests import adapter_weights, losses, run_recipe

from lorakit.cli.export import open_source, parse_targets
from lorakit.data.answers import decode_answer
from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import Conversation
from lorakit.export.run import export as write_exports
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.model.generation import greedy_answers
from lorakit.model.load import load_model
from lorakit.model.resolve import resolve_base
from lorakit.model.tokenizer import load_tokenizer, pad_token_id, stop_token_ids
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.recipe.schema import Model

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.smollm2


def test_it_answers_that_the_capital_of_france_is_paris(users_cache):
    base = resolve_base(SMOL, "main", Silent())
    tokenizer = load_tokenizer(base, None)
    model = load_model(base, Model(base=SMOL, dtype="float32", attention="sdpa"), "cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    stops = stop_token_ids(base, tokenizer)
    (answer,) = greedy_answers(model, [prompt], stops, 12, pad_token_id(tokenizer), "", Silent())
    assert "Paris" in decode_answer(answer.tokens, tokenizer)
    assert not hasattr(model.config, "quantization_config")


def test_its_template_with_a_default_system_prompt_is_masked_exactly(users_cache):
    base = resolve_base(SMOL, "main", Silent())
    template = ChatTemplate(load_tokenizer(base, None))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (rendered,) = render(Conversation(talk), template)
    (span,) = rendered.spans
    assert rendered.text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.text[span.start : span.end] == "ho<|im_end|>"


@pytest.mark.slow
def test_a_few_steps_on_debian_json_lower_the_loss(users_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parent.parent / "recipes" / "debian-json" / "recipe.yaml"
    run, _ = run_recipe(recipe, tmp_path / "run", "train.steps=6", "data.eval=null", "train.save_every=6")
    found = losses(run)
    assert found[0] > 3 and found[-1] < 2
    assert json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == SMOL
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(run).values())
    proof = merge(input_of_run(*reopen_run(run.folder, Silent()), Silent()), run.merged, Silent()).proof
    assert proof.mean_kl < 1e-3 and proof.top1_agreement_beyond_ties >= 0.995


@pytest.mark.slow
def test_llama_cpp_answers_what_transformers_does_on_a_hundred_rows(users_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parent.parent / "recipes" / "debian-json" / "recipe.yaml"
    run, _ = run_recipe(recipe, tmp_path / "run", "train.steps=20", "train.eval_every=20", "train.save_every=20")
    with open_source(str(run.folder), None, None, Silent()) as source:
        write_exports(source, parse_targets(["gguf:f16"]), run.exports, False, Silent())
    adapter, gguf = score(run.folder, run.exports / "gguf-f16" / "debian-json-F16.gguf", rows=100).models
    assert len(gguf.answers) == 100
    assert sum(one == other for one, other in zip(gguf.answers, adapter.answers, strict=True)) >= 95
    assert gguf.nats.sum() == pytest.approx(adapter.nats.sum(), rel=0.01)
