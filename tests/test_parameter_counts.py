"""Parameter counts from configs alone: published figures, and what PEFT counts on the attached model."""

import copy
import json
import resource

import pytest
import torch
from model_families import FAMILIES
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.model.spec_from_meta import spec_from_meta
from lorakit.model.targets import select_targets
from lorakit.plan.trainable_params import count_parameters
from lorakit.recipe.schema import Adapter
from lorakit.registry import ADAPTERS

_WIDE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    **_WIDE,
}
LLAMA_31_8B = {**MISTRAL_7B, "model_type": "llama", "vocab_size": 128256}
LLAMA_2_7B = {**LLAMA_31_8B, "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32}
MIXTRAL_8X7B = {**MISTRAL_7B, "model_type": "mixtral", "num_local_experts": 8}
LLAMA_70B = {
    **LLAMA_31_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


@pytest.mark.parametrize(
    ("config", "settings", "trainable", "total"),
    [
        (MISTRAL_7B, {"rank": 16}, 41_943_040, 7_241_732_096),
        (LLAMA_31_8B, {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 13_631_488, 8_030_261_248),
        (LLAMA_2_7B, {"rank": 8, "targets": ["q_proj", "v_proj"]}, 4_194_304, 6_738_415_616),
        # 32 blocks: q and o 16 x 8192, k and v 16 x 5120; each of 8 experts 16 x (4096 + 28672) + 16 x (14336 + 4096).
        (MIXTRAL_8X7B, {"rank": 16}, 32 * (2 * 131_072 + 2 * 81_920 + 8 * 819_200), 46_702_792_704),
    ],
)
def test_counts_agree_with_published_ones(config, settings, trainable, total):
    assert count_parameters(spec_from_meta(config), Adapter(**settings)) == (trainable, total + trainable)


def test_the_weights_of_a_large_model_are_not_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert count_parameters(spec_from_meta(LLAMA_70B), Adapter())[0] == 207_093_760
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB, of 141 GB in bfloat16


@pytest.mark.parametrize("kind", [entry.name for entry in ADAPTERS if entry.name != "none"])
@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("llama", {}, {"train_modules": ["embed_tokens", "lm_head"], "layers": [1]}),
        ("llama", {"tie_word_embeddings": True}, {"train_modules": ["lm_head"], "targets": "attention"}),
        ("gpt2", {}, {"train_modules": ["ln_f"]}),
        ("mixtral", {}, {"exclude": ["experts"]}),
    ],
)
def test_counts_are_those_of_the_attached_model(kind, family, changes, settings):
    config = copy.deepcopy(FAMILIES[family].config)
    for key, value in changes.items():
        setattr(config, key, value)
    adapter = Adapter(kind=kind, rank=3, **settings)
    model = AutoModelForCausalLM.from_config(config)
    attached = get_peft_model(model, ADAPTERS[kind].function(adapter, select_targets(model, adapter)))
    assert count_parameters(spec_from_meta(config.to_dict()), adapter) == attached.get_nb_trainable_parameters()


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_ranks_of_fused_experts_are_counted(family):
    adapter = Adapter(rank=3, rank_overrides={"experts": 5, "o_proj": 2})
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family].config))
    attached = get_peft_model(model, ADAPTERS["lora"].function(adapter, select_targets(model, adapter)))
    assert (
        count_parameters(spec_from_meta(FAMILIES[family].config.to_dict()), adapter)
        == attached.get_nb_trainable_parameters()
    )


def test_full_fine_tuning_trains_everything_or_the_chosen_weights():
    config = FAMILIES["llama"].config
    total = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    assert count_parameters(spec_from_meta(config.to_dict()), Adapter(kind="none")) == (total, total)
    assert count_parameters(spec_from_meta(config.to_dict()), Adapter(kind="none", layers=[0], targets="mlp")) == (
        3 * 16 * 24,
        total,
    )


def test_a_folder_is_counted_by_its_config(tiny_base, tmp_path):
    (tmp_path / "config.json").write_text((tiny_base / "config.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    assert count_parameters(spec_from_meta(tmp_path), Adapter()) == count_parameters(spec_from_meta(config), Adapter())
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize("config", [{"model_type": "no_such"}, {"model_type": "vit"}])
def test_a_config_of_no_language_model_is_refused(config):
    with pytest.raises(UserError, match=r"can make no causal language model of this config: .*Fetch the model again"):
        count_parameters(spec_from_meta(config), Adapter())
