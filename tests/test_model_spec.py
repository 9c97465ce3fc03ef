"""What a model is made of, from its config: equal to the model that transformers makes, for every family."""

import dataclasses
import subprocess
import sys

import pytest
from model_families import FAMILIES
from peft_adapters import counted_by_peft
from transformers import AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.model.spec import spec_from_config
from lorakit.model.spec_from_meta import spec_from_meta
from lorakit.plan.trainable_params import count_parameters, count_trainable
from lorakit.recipe.schema import Adapter
from lorakit.registry import ADAPTERS

COUNTED = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "gemma2",
    "gemma3-text",
    "phi3",
    "phi",
    "smollm3",
]
CHOICES = [
    {},
    {"targets": "attention"},
    {"targets": "mlp", "layers": [1]},
    {"train_modules": ["embed_tokens"]},
    {"exclude": ["experts"]},
]


@pytest.fixture(scope="module")
def specs():
    """The spec of every family, built on the meta device."""
    return {name: spec_from_meta(family.config.to_dict()) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_loaded_model(family, specs):
    loaded = AutoModelForCausalLM.from_config(FAMILIES[family].config)
    assert specs[family].parameters == sum(parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize("family", COUNTED)
def test_what_is_counted_from_a_config_is_what_transformers_builds(family, specs):
    config = FAMILIES[family].config.to_dict()
    found, built = spec_from_config(config), specs[family]
    for field in dataclasses.fields(found):
        if field.name == "weights":  # whether PEFT renames a layer is asked of PEFT, where training needs it
            plain = [dataclasses.replace(weight, peft_renames=False) for weight in built.weights]
            assert list(found.weights) == plain
        elif field.name != "built":
            assert getattr(found, field.name) == getattr(built, field.name), field.name
    assert not found.built and built.built


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_ties_and_biases_are_counted(changes):
    config = FAMILIES["llama"].config
    for key, value in changes.items():
        setattr(config, key, value)
    loaded = AutoModelForCausalLM.from_config(config)
    assert spec_from_config(config.to_dict()).parameters == sum(parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize("kind", [entry.name for entry in ADAPTERS])
def test_parameters_are_those_that_peft_counts(kind, specs):
    compared = 0
    names = FAMILIES if kind in ("lora", "none") else ("llama", "gpt2", "mixtral", "phi3", "jamba")
    for name, spec in ((name, specs[name]) for name in names):
        config = FAMILIES[name].config.to_dict()
        for choice in CHOICES[:1] if name not in COUNTED else CHOICES:
            if kind == "none" and "train_modules" in choice:
                continue
            settings = Adapter(kind=kind, rank=3, **choice)
            expected = outcome(lambda settings=settings, config=config: counted_by_peft(config, settings))
            for found in filter(None, (spec, spec_from_config(config))):
                counts = outcome(lambda found=found, settings=settings: count_parameters(found, settings))
                assert counts == expected, (name, choice, found.built)
                compared += 1
    assert compared > 10


def outcome(count):
    """What is counted; None where the adapter section is refused."""
    try:
        return count()
    except UserError:
        return None


def test_the_adapter_of_a_folder_is_counted_by_its_configuration(tmp_path, specs):
    import torch
    from peft import LoraConfig, get_peft_model

    for use_dora, whole in ((False, None), (True, ["lm_head"])):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"].config)
        config = LoraConfig(
            r=3,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"model.layers.1.mlp.down_proj": 5},
            use_dora=use_dora,
            modules_to_save=whole,
            task_type="CAUSAL_LM",
        )
        attached = get_peft_model(model, config)
        attached.save_pretrained(tmp_path / str(use_dora))
        settings = Adapter.model_construct(**Adapter().__dict__ | {"from": str(tmp_path / str(use_dora))})
        assert count_trainable(specs["llama"], settings).trained == attached.get_nb_trainable_parameters()[0]


def test_a_name_that_is_no_module_is_refused(specs):
    with pytest.raises(UserError, match="'embeddings' is not a module of this model, which has embed_tokens"):
        count_trainable(specs["llama"], Adapter(train_modules=["embeddings"]))


def test_configs_that_are_not_counted_are_left_to_the_meta_device():
    config = FAMILIES["llama"].config.to_dict()
    assert spec_from_config(config | {"model_type": "somebodys"}) is None
    assert spec_from_config({key: value for key, value in config.items() if key != "vocab_size"}) is None
    assert spec_from_config(FAMILIES["gemma3"].config.to_dict()) is None  # it has a vision tower
    assert spec_from_config(FAMILIES["qwen3-moe"].config.to_dict() | {"mlp_only_layers": [0]}) is None


def test_counting_loads_no_torch():
    code = (
        "import sys; from lorakit.plan.model_info import parse_model_info\n"
        "from lorakit.plan.model_info import known_config\n"
        "from lorakit.plan.trainable_params import count_trainable; from lorakit.recipe.schema import Adapter\n"
        "spec = parse_model_info(known_config('meta-llama/Llama-3.1-70B')).spec\n"
        "print(spec.parameters, count_trainable(spec, Adapter()).trained)\n"
        "assert not {'torch', 'transformers', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["70553706496", "207093760"], done.stderr
