"""Promises on adapters from elsewhere: what PEFT loads is scored, trained on, merged and combined; what it does not
load as a whole is refused."""

import json
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES
from peft import PeftModel, get_peft_model
from peft_adapters import KINDS, expert_shapes, lora, save_peft_adapter, write_old_layout
from runs_of_tests import run_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lorakit.errors import UserError
from lorakit.merge.combine import Combination, combine, open_adapter
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.model.layerwise import layerwise_model
from lorakit.model.peft_adapter import adapter_config, continue_adapter, load_adapter
from lorakit.model.spec_from_meta import meta_model, spec_from_meta
from lorakit.model.state_dict import open_weights
from lorakit.plan.trainable_params import count_trainable
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.recipe.schema import Adapter

IDS = torch.tensor([[5, 6, 7, 3, 9, 30]])
GATED = ("gate_proj", "up_proj", "down_proj")
TARGETS = ["q_proj", *GATED]
ATTENTION = {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in (0, 1)}
OLD = {
    "qwen3-moe": (TARGETS, ATTENTION | expert_shapes("mlp.experts", GATED, 12, 16)),
    "mixtral": (["w1", "w2", "w3"], expert_shapes("block_sparse_moe.experts", ("w1", "w3", "w2"), 24, 16)),
    "deepseek-v3": (
        list(GATED),
        {name: shape for name, shape in expert_shapes("mlp.experts", GATED, 12, 16).items() if "layers.1." in name},
    ),
    "gemma3": (r".*language_model.*\.q_proj", {f"language_model.{name}": shape for name, shape in ATTENTION.items()}),
}
"""Families whose layers had other names once: the targets, and the layers by these names."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The tiny model of a family as a folder."""
    made: dict[str, Path] = {}

    def base(family):
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp("base")
            AutoModelForCausalLM.from_config(FAMILIES[family].config).save_pretrained(made[family])
        return made[family]

    return base


def in_memory(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def every_way(base, adapter):
    """The model with an adapter as each command makes it, by its name."""
    weights = open_weights(base)
    return {
        "eval": lambda: load_adapter(in_memory(base), adapter),
        "adapter.from": lambda: continue_adapter(in_memory(base), adapter, 0.0),
        "merge": lambda: layerwise_model(base, "eager", weights.read, weights.pieces, adapter=adapter),
        "combine": lambda: open_adapter(adapter, base),
    }


@pytest.mark.parametrize("family", OLD)
def test_adapters_whose_names_peft_changes_are_taken_everywhere(family, bases, tmp_path):
    base = bases(family)
    adapter = write_old_layout(tmp_path / "old", base, *OLD[family])
    wanted, plain = logits(PeftModel.from_pretrained(in_memory(base), adapter)), logits(in_memory(base))
    assert (wanted - plain).abs().max() > 1e-3
    for way, made in every_way(base, adapter).items():
        found = made()
        if way != "combine":
            assert torch.allclose(logits(found), wanted, atol=1e-5), way
    (tmp_path / "both").mkdir()
    combine([adapter, adapter], Combination("cat", [0.5, 0.5]), base, tmp_path / "both", "both")
    both = PeftModel.from_pretrained(in_memory(base), tmp_path / "both")
    assert torch.allclose(logits(both), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "without", "named"),
    [
        ("qwen3-moe", "layers.1.mlp.experts.2.up_proj.lora_A", "experts.2.up_proj.lora_A.weight"),
        ("qwen3-moe", "layers.1.mlp.experts.2.", "experts.base_layer.lora_A"),
        ("qwen3-moe", "layers.1.mlp.", "layers.1.mlp.experts.* and 3 more"),
        ("qwen3-moe", "layers.1.self_attn.q_proj.lora_B", "lacks .*layers.1.self_attn.q_proj.lora_B.weight"),
        ("mixtral", "layers.0.block_sparse_moe.experts.3.w2.lora_B", "experts.3.w2.lora_B.weight"),
        ("gemma3", "layers.1.self_attn.q_proj.lora_A", "lacks .*language_model.layers.1.self_attn.q_proj.lora_A"),
    ],
)
def test_adapters_of_older_names_that_lack_something_are_refused_by_name(family, without, named, bases, tmp_path):
    base = bases(family)
    adapter = write_old_layout(tmp_path / "old", base, *OLD[family], without=without)
    for made in every_way(base, adapter).values():
        with pytest.raises(UserError, match=named):
            made()


def test_an_adapter_of_another_model_is_refused_by_name(bases, tmp_path):
    base = bases("gemma3")
    of_the_text = write_old_layout(tmp_path / "text", base, r".*language_model.*\.q_proj", ATTENTION)
    for made in every_way(base, of_the_text).values():
        with pytest.raises(UserError, match=r"lacks base_model\.model\.model\.language_model\.layers\.0"):
            made()
    deeper = write_old_layout(
        tmp_path / "deep", bases("llama"), ["q_proj"], ATTENTION | {"model.layers.7.q_proj": (9, 9)}
    )
    for made in every_way(bases("llama"), deeper).values():
        with pytest.raises(UserError, match=r"layers\.7\.q_proj\.lora_A\.weight and 1 more, for which"):
            made()


def test_magnitudes_without_a_name_of_their_own_are_taken(bases, tmp_path):
    base = bases("llama")
    adapter = save_peft_adapter(base, tmp_path / "dora", KINDS["dora"]())
    wanted = logits(PeftModel.from_pretrained(in_memory(base), adapter))
    file = adapter / "adapter_model.safetensors"
    tensors = {name.removesuffix(".weight") if "magnitude" in name else name: t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for way, made in every_way(base, adapter).items():
        if way != "combine":
            assert torch.allclose(logits(made()), wanted, atol=1e-5), way


def test_a_run_goes_on_from_one_lora_an_expert_and_is_merged(recipe_file, tmp_path, tokenizer):
    config = FAMILIES["qwen3-moe"].config.to_dict() | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    base = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**config)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    old = write_old_layout(tmp_path / "old", base, *OLD["qwen3-moe"])
    adapter = {"from": str(old), "rank": ..., "alpha": ...}
    short = {"steps": 2, "epochs": None, "save_every": 2, "eval_every": 2}
    path = recipe_file(model={"base": str(base)}, adapter=adapter, train=short)
    run, _ = run_recipe(path, tmp_path / "run")
    assert json.loads((run.adapter / "adapter_config.json").read_text())["target_parameters"]
    opened, prepared = reopen_run(run.folder, Silent())
    assert merge(input_of_run(opened, prepared, Silent()), opened.merged, Silent()).proof


SETTINGS = {
    "names that match nothing": {"target_modules": ["q_proj", "gate_up_proj", "c_attn"]},
    "a pattern": {"target_modules": r".*self_attn\.(q|k)_proj"},
    "exclusions": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "ranks by pattern": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.\d\.mlp\.up_proj": 2}},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_is_planned_by_what_peft_makes_of_its_configuration(settings, bases, tmp_path):
    base = bases("llama")
    folder = save_peft_adapter(base, tmp_path / "adapter", lora(**SETTINGS[settings]))
    planned = count_trainable(spec_from_meta(base), Adapter.model_validate({"from": str(folder)}))
    trained = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert planned.matrices == trained > 0


def test_one_lora_an_expert_is_planned_as_what_peft_makes_of_it(bases, tmp_path):
    base = bases("qwen3-moe")
    folder = write_old_layout(tmp_path / "old", base, *OLD["qwen3-moe"])
    planned = count_trainable(spec_from_meta(base), Adapter.model_validate({"from": str(folder)}))
    config = adapter_config(folder)
    config.init_lora_weights, config.inference_mode = False, False
    with torch.device("meta"):
        attached = get_peft_model(meta_model(base), config)
    assert planned.matrices == attached.get_nb_trainable_parameters()[0]


def test_an_adapter_that_brings_other_weights_of_the_base_is_not_trained_on(bases, tmp_path):
    base = bases("llama")
    adapter = save_peft_adapter(base, tmp_path / "adapter", KINDS["lora on embeddings"]())
    assert continue_adapter(in_memory(base), adapter, 0.0)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has another model\.embed_tokens\.weight than the base.* Merge it"):
        continue_adapter(in_memory(base), adapter, 0.0)
