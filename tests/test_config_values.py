"""Promises on config.json: a damaged value is named, and a checkpoint that is quantized already is told alike."""

import json
import math

import pytest
import yaml
from conftest import rows_of, write_rows
from model_families import FAMILIES

from lorakit.errors import UserError
from lorakit.model.quantization_config import check_quantization, parse_quantization
from lorakit.model.resolve import Base
from lorakit.model.spec import spec_from_config
from lorakit.plan.memory import size_run
from lorakit.plan.model_info import parse_model_info, read_model_info
from lorakit.recipe.adapter_kind import effective_model, trains_all
from lorakit.recipe.load import load

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
COUNTED = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "smollm3", "phi3", "phi"),
    *("gemma2", "gemma3-text"),
]


@pytest.fixture
def recipe_on(tmp_path, monkeypatch):
    """Write a recipe on a model folder that holds nothing but the config of a family, with some keys changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    write_rows(tmp_path / "train.jsonl", rows_of(40))

    def write(family="llama", changes=None, model=None, **sections):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        config = {**FAMILIES[family].config.to_dict(), **(changes or {})}
        (folder / "config.json").write_text(json.dumps(config))
        recipe = {"name": "r", "model": {"base": str(folder), **(model or {})}, "data": {"train": "train.jsonl"}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **sections}))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    ("family", "key", "value", "said"),
    [
        ("llama", "num_attention_heads", "32", 'is "32", not a whole number of at least 1'),
        ("llama", "num_attention_heads", 0, "is 0, not a whole number of at least 1"),
        ("llama", "num_key_value_heads", "4", 'is "4", not a whole number of at least 1'),
        ("llama", "head_dim", "64", 'is "64", not a whole number of at least 1'),
        ("llama", "hidden_size", -5, "is -5, not a whole number of at least 1"),
        ("llama", "hidden_size", "2048", 'is "2048", not a whole number of at least 1'),
        ("llama", "hidden_size", 2048.0, "is 2048.0, not a whole number of at least 1"),
        ("llama", "hidden_size", True, "is true, not a whole number of at least 1"),
        ("llama", "num_hidden_layers", [2], "is [2], not a whole number of at least 1"),
        ("llama", "vocab_size", False, "is false, not a whole number of at least 1"),
        ("llama", "intermediate_size", "24", 'is "24", not a whole number of at least 1'),
        ("mixtral", "num_local_experts", "8", 'is "8", not a whole number of at least 1'),
        ("mixtral", "num_local_experts", 0, "is 0, not a whole number of at least 1"),
        ("mixtral", "num_experts_per_tok", "2", 'is "2", not a whole number of at least 1'),
        ("llama", "tie_word_embeddings", "false", 'is "false", not true or false'),
        ("llama", "attention_bias", 0, "is 0, not true or false"),
        ("llama", "quantization_config", "nf4", 'is "nf4", not a mapping'),
        ("llama", "quantization_config", ["nf4"], 'is ["nf4"], not a mapping'),
        ("gpt2", "quantization_config", "nf4", 'is "nf4", not a mapping'),
        ("llama", "text_config", "x", 'is "x", not a mapping'),
    ],
)
def test_a_damaged_value_is_named(recipe_on, lorakit, command, family, key, value, said):
    code, _, err = lorakit(command, recipe_on(family, {key: value}))
    assert code == 2 and f"model.base: config.json: {key} {said}. Fetch the model again." in err


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_attention_heads": 5, "head_dim": None},
            "hidden_size is 16, which is not a multiple of num_attention_",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, which is not a multiple of num_key_value_heads, 3"),
        ({"quantization_config": {**NF4, "bnb_4bit_quant_type": "nf5"}}, 'bnb_4bit_quant_type is "nf5", not nf4 or '),
        ({"quantization_config": {**NF4, "load_in_4bit": "yes"}}, 'load_in_4bit is "yes", not true or false'),
        ({"quantization_config": {"quant_method": "gptq", "bits": "8"}}, 'bits is "8", not a whole number'),
    ],
)
def test_values_that_do_not_go_together_are_named(recipe_on, lorakit, command, changes, said):
    code, _, err = lorakit(command, recipe_on("llama", changes))
    assert code == 2 and f"model.base: config.json: {said}" in err


@pytest.mark.parametrize("value", ["12", 0, -1, True, 1.5, [4], {}])
def test_the_sizes_of_a_family_that_is_not_counted_are_left_to_transformers(value):
    config = FAMILIES["gpt2"].config.to_dict()
    for key in ("n_embd", "n_head", "n_layer", "n_inner", "head_dim", "hidden_size", "num_key_value_heads"):
        found = parse_model_info(config | {key: value})
        assert found is None if key == "n_embd" else found.hidden_size == 16
    assert parse_model_info(config | {"intermediate_size": [4]}).attention_at == math.inf


@pytest.mark.parametrize("family", COUNTED)
def test_a_size_that_only_transformers_knows_is_left_to_the_meta_device(family):
    config = FAMILIES[family].config
    own = {mapped: name for name, mapped in config.attribute_map.items()}
    assert spec_from_config(config.to_dict()) is not None
    for key in ("num_key_value_heads", "head_dim", "num_experts_per_tok", "num_local_experts"):
        given = config.to_dict()
        if given.pop(key, None) is None:
            continue
        default = getattr(type(config), key, getattr(type(config), own.get(key, key), None))
        assert (spec_from_config(given) is None) == (default is not None), key


def test_an_absent_size_is_taken_from_the_others_where_transformers_does_so():
    config = FAMILIES["llama"].config.to_dict()
    del config["head_dim"], config["num_key_value_heads"]
    found = spec_from_config(config)
    assert found.key_value == found.hidden == 16


def test_a_damaged_value_ends_what_a_run_prepares(recipe_on, tmp_path):
    recipe_on("llama", {"num_attention_heads": "4"})
    with pytest.raises(UserError, match=r'config\.json: num_attention_heads is "4"'):
        read_model_info(tmp_path / "model")


@pytest.mark.parametrize(
    ("stored", "sections", "said"),
    [
        (NF4, {"model": {"quantization": "nf4"}}, "are nf4 already and cannot be put into nf4. Write none"),
        (NF4, {"model": {"quantization": "nf4"}, "adapter": {"kind": "pissa"}}, "cannot be put into nf4. Write none"),
        (NF4, {"adapter": {"kind": "loftq"}}, "are nf4 already and cannot be put into nf4. Write none"),
        (NF4, {"adapter": {"kind": "none"}}, "adapter.kind: none trains the weights themselves, and the weights of"),
        ({"load_in_8bit": True}, {"model": {"quantization": "q4"}}, "are q8 already and cannot be put into q4"),
        ({"quant_method": "fp8"}, {"model": {"quantization": "q8"}}, "are fp8 already and cannot be put into q8"),
        ({"quant_method": "gptq", "bits": 4}, {"adapter": {"kind": "none"}}, "are gptq already. Write lora"),
        ({"quant_method": "hqq"}, {}, "are hqq already, which lorakit does not train on"),
        ({"quant_method": "aqlm"}, {}, "are aqlm already, which lorakit does not train on"),
        ({}, {}, "are of an unnamed method already, which lorakit does not train on"),
    ],
)
def test_check_plan_and_train_refuse_a_quantized_checkpoint_alike(recipe_on, lorakit, tmp_path, stored, sections, said):
    path = recipe_on("llama", {"quantization_config": stored}, **sections)
    recipe = load(path).recipe
    with pytest.raises(UserError) as refused:
        check_quantization(
            Base(recipe.model.base, tmp_path / "model", "local folder"),
            effective_model(recipe),
            trains_all(recipe.adapter),
        )
    text = " ".join(str(refused.value).split())
    assert said in text
    for command in ("check", "plan"):
        code, _, err = lorakit(command, path)
        assert code == 2 and text in err, command


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_a_quantized_checkpoint_is_planned_without_what_cannot_be_trained(recipe_on, lorakit, kind):
    path = recipe_on("llama", {"quantization_config": NF4}, adapter={"kind": kind})
    code, _, err = lorakit("check", path)
    assert code == 2 and "has no .safetensors file" in err  # nothing else stands against it
    code, out, _ = lorakit("plan", path, "--gpu", "8GB", "--json")
    found = json.loads(out)
    assert code == 0 and found["full_fine_tuning"] is None
    assert found["checkpoint"]["quantization"] == "nf4"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_bits_of_a_checkpoint_are_read(recipe_on, method):
    config = FAMILIES["llama"].config.to_dict()
    for bits, held in ((8, "q8"), (4, "nf4"), (None, "nf4")):
        named = {"quant_method": method, "bits": bits}
        assert parse_quantization({"quantization_config": named}).bits == bits
        facts = parse_model_info(config | {"quantization_config": named})
        load_ = size_run(load(recipe_on()).recipe, facts, facts.spec, on_gpu=True)
        assert load_.quantization == held


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_more_layers_than_any_model_has_are_damage(family):
    config = FAMILIES[family].config.to_dict() | {"num_hidden_layers": 10**9}
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000, not a whole number from 1 to 1,000"):
        parse_model_info(config)
