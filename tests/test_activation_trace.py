"""What a model's own code keeps, followed without numbers, against what it really keeps and against what is derived."""

import json
import re
from functools import partial

import pytest
from model_families import FAMILIES
from test_activations import measured
from transformers import AutoConfig

from lorakit.errors import UserError
from lorakit.model.activation_trace import trace_activations
from lorakit.plan.activations import TrainingStep, block_activations, spec_with_trace
from lorakit.plan.model_info import known_config, parse_model_info
from lorakit.plan.trainable_params import count_trainable
from lorakit.recipe.schema import Adapter

FAMILIES_THAT_ARE_COUNTED = {
    "llama": "meta-llama/Llama-3.1-8B",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen2": "Qwen/Qwen2.5-7B",
    "qwen3": "Qwen/Qwen3-8B",
    "qwen3-moe": "Qwen/Qwen3-30B-A3B",
    "phi": "microsoft/phi-2",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "gemma": "google/gemma-2b",
    "gemma2": "google/gemma-2-9b",
    "gemma3": "google/gemma-3-1b-pt",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "apertus": "swiss-ai/Apertus-8B-2509",
}


_FAST = ("llama", "qwen3-moe", "gemma3")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=family, marks=[] if family in _FAST else [pytest.mark.slow])
        for family, name in FAMILIES_THAT_ARE_COUNTED.items()
    ],
)
def test_what_is_derived_is_what_the_code_of_the_bundled_models_keeps(name):
    config, settings = known_config(name), Adapter(rank=8)
    spec = parse_model_info(config).spec
    attention, bytes_by_block = trace_activations(AutoConfig.for_model(**config), spec, settings, half=True)
    way = TrainingStep(1, 1, 1, attention=attention, on_gpu=False)
    for number, (token, pair) in bytes_by_block.items():
        derived = block_activations(spec, spec.blocks[number], count_trainable(spec, settings), way)
        assert derived.per_token == pytest.approx(token, rel=0.08)
        assert derived.per_pair == pytest.approx(pair, rel=0.01)


@pytest.mark.parametrize(
    ("family", "attention", "settings"),
    [
        ("qwen3-next", "sdpa", {}),  # linear attention in three of four blocks, and experts
        ("gpt2", "sdpa", {}),  # dropout of its own in attention, for which a processor writes the scores out
        ("gpt-j", "eager", {}),
        ("stablelm", "sdpa", {"kind": "none"}),
        ("cohere", "sdpa", {"dropout": 0.1}),
    ],
)
def test_what_a_family_keeps_that_nobody_counted_is_seen(family, attention, settings):
    adapter = Adapter(**{"rank": 4} | settings)
    made_of = partial(spec_with_trace, settings=adapter)
    token, pair, found = measured(family, adapter, True, attention, True, made_of)
    assert found.per_token == pytest.approx(token, rel=0.05)
    assert found.per_pair == pytest.approx(pair, rel=0.01)


def test_dora_in_float32_is_followed_though_its_norms_hang_on_numbers():
    adapter, config = Adapter(kind="dora", rank=4), FAMILIES["gpt-j"].config
    attention, bytes_by_block = trace_activations(
        config, spec_with_trace(config.to_dict(), adapter), adapter, half=False
    )
    assert attention == "eager" and all(token > 0 and pair > 0 for token, pair in bytes_by_block.values())
    token, pair, found = measured("gpt-j", adapter, False, "eager", True, partial(spec_with_trace, settings=adapter))
    assert (found.per_token, found.per_pair) == pytest.approx((token, pair), rel=0.02)


@pytest.mark.slow
def test_a_model_of_any_size_is_followed():
    config = {"model_type": "qwen3_5_text", "hidden_size": 16384, "intermediate_size": 65536}
    spec = spec_with_trace(config, Adapter())
    linear, full = (spec.extra_bytes[number, 2][0] for number in (0, 3))
    assert spec.parameters > 1e11
    assert linear > 5 * full > 0  # the scan of linear attention, written out in torch, is none of what is derived


def test_code_that_asks_for_numbers_is_not_followed():
    spec = spec_with_trace(FAMILIES["jetmoe"].config.to_dict(), Adapter())
    assert spec.extra_bytes == {} and "DataDependent" in spec.untraced


def test_a_plan_says_why_code_is_not_followed(lorakit_plan, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(FAMILIES["jetmoe"].config.to_json_string())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "completion": "two"}\n' * 50)
    (tmp_path / "recipe.yaml").write_text(f"model: {{base: {tmp_path}/base}}\ndata: {{train: rows.jsonl}}\n")
    code, out, _ = lorakit_plan(tmp_path / "recipe.yaml", "--gpu", "8GB")
    assert code == 0
    assert "memory is within 60%: the code of this family cannot be followed (DataDependent" in " ".join(out.split())


def test_layers_that_differ_are_followed_and_planned(lorakit_plan, tmp_path):
    sizes = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gemma4_text"} | sizes))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "completion": "two"}\n' * 50)
    (tmp_path / "recipe.yaml").write_text(f"model: {{base: {tmp_path}/base}}\ndata: {{train: rows.jsonl}}\n")
    code, out, _ = lorakit_plan(tmp_path / "recipe.yaml", "--gpu", "8GB", "--json")
    assert code == 0
    assert json.loads(out)["memory"]["error"] == 0.15


def test_a_saved_config_with_infinities_is_read(tmp_path):
    AutoConfig.for_model("falcon_h1", num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path)
    assert spec_with_trace(tmp_path, Adapter()).layers == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "nosuch", "hidden_size": 64}, "model type `nosuch`"),
        ({"model_type": "olmo2", "num_hidden_layers": "x"}, "expected int, got str (value: 'x')"),
        ({"model_type": "olmo2", "vocab_size": 0}, "Padding_idx"),
        ({"model_type": "qwen2_5_vl"}, "Unrecognized configuration class"),
    ],
)
def test_what_no_model_can_be_made_of_says_why_in_a_sentence(config, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        spec_with_trace(tmp_path, Adapter())
    assert len(str(raised.value)) < 500 and "Fetch the model again" in str(raised.value)
