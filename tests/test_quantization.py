"""Promises of `model.quantization`: one base throughout, honest figures, checkpoints that are quantized already."""

import json
import shutil

import pytest
import torch
from conftest import TINY_LLAMA
from runs_of_tests import losses, run_recipe
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.pytorch_utils import Conv1D

from lorakit.errors import UserError
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.model.load import dequantize, describe_quantization, load_model, original_weights, summarize_quantization
from lorakit.model.quantization_config import refuse_irreversible, stored_quantization
from lorakit.model.resolve import Base
from lorakit.plan.memory import quantization_line, weight_bytes
from lorakit.plan.model_info import find_model_info, read_model_info
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.recipe.schema import Model

IDS = torch.arange(24).reshape(2, 12)
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def base_of(folder) -> Base:
    return Base(folder.name, folder, "local folder")


def loaded(folder, quantization="none", trainable=False, **values):
    settings = Model(base=str(folder), **{"dtype": "float32", "attention": "eager", **values})
    settings = settings.model_copy(update={"quantization": quantization})
    return load_model(base_of(folder), settings, "cpu", trainable)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def made(folder, config, dtype=torch.float32):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized_folders(tmp_path_factory, tiny_base):
    """The tiny Llama as bitsandbytes saves it quantized, from bfloat16: by our word."""
    folders = {}
    for word in ("nf4", "q8"):
        folder = tmp_path_factory.mktemp(word) / "model"
        shutil.copytree(tiny_base, folder)
        (folder / "model.safetensors").unlink()
        loaded(tiny_base, word, dtype="bfloat16").save_pretrained(folder)
        folders[word] = folder
    return folders


@pytest.mark.parametrize("quantization", ["q8", "q4", "nf4"])
def test_training_evaluation_and_merging_see_one_base(tiny_base, quantization):
    model = loaded(tiny_base, quantization)
    evaluated = logits(model)
    assert torch.equal(logits(model.train()), evaluated)
    assert torch.equal(logits(model.eval()), evaluated)
    assert (logits(loaded(tiny_base)) - evaluated).abs().max() > 1e-3
    assert torch.allclose(logits(dequantize(model)), evaluated, atol=1e-6)


TINY = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES = [
    LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    LlamaConfig(**TINY, tie_word_embeddings=True),
    MistralConfig(**TINY, head_dim=64),
    Qwen2Config(**TINY, tie_word_embeddings=True),
    Qwen3Config(**TINY, head_dim=64),
    SmolLM3Config(**TINY),
    Phi3Config(**TINY),
    GemmaConfig(**TINY, head_dim=64),
    Gemma2Config(**TINY, head_dim=64),
    Gemma3TextConfig(**TINY, head_dim=64),
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_share_and_bytes_are_known_before_the_model_is_loaded(tmp_path, config):
    made(tmp_path / "model", config)
    spec = read_model_info(tmp_path / "model").spec
    for quantization, double in (("nf4", True), ("q4", False), ("q8", False)):
        held = summarize_quantization(loaded(tmp_path / "model", quantization, dtype="bfloat16", double_quant=double))
        quantizable = sum(weight.size for weight in spec.quantizable)
        assert (spec.parameters, quantizable) == (held.parameters, held.quantized)
        assert weight_bytes(spec, "none", double, 2) == held.unquantized_bytes
        assert weight_bytes(spec, quantization, double, 2) == pytest.approx(held.bytes, rel=0.01)


def test_smollm2_is_counted_before_it_is_here():
    facts = find_model_info(SMOL, "main")
    assert facts.spec.parameters == 134_515_008
    words = quantization_line(Model(base=SMOL, dtype="bfloat16", quantization="nf4"), None, facts)
    assert words == "nf4: 79% of the parameters are quantized, 111.5 MB instead of 269.0 MB (saves 157.6 MB)"


def test_fused_experts_are_not_counted_as_quantized(tmp_path):
    made(tmp_path / "model", MixtralConfig(**TINY, num_local_experts=4))
    held = summarize_quantization(loaded(tmp_path / "model", "nf4"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert held.experts == experts > held.quantized
    assert held.parameters == sum(p.numel() for p in model.parameters())
    assert "are fused experts, which stay as they are" in describe_quantization(held, "nf4", None, "float32")


@pytest.mark.parametrize("quantization", ["q8", "nf4"])
def test_gpt2_is_trained_and_merged_from_quantized_weights(recipe_file, tmp_path, tiny_base, tokenizer, quantization):
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_base, folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=2)
    made(folder, config)
    path = recipe_file(model={"base": str(folder), "quantization": quantization}, train={"epochs": 1})
    run_recipe(path, tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    proof = merge(input_of_run(run, prepared, Silent()), run.merged, Silent()).proof
    assert proof.max_logit_difference <= 1e-4 * proof.logit_scale
    merged = AutoModelForCausalLM.from_pretrained(run.merged)
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D


@pytest.mark.parametrize("word", ["nf4", "q8"])
def test_a_quantized_checkpoint_is_trained_as_it_is_and_merged(recipe_file, tmp_path, quantized_folders, word):
    run_recipe(recipe_file(model={"base": str(quantized_folders[word])}, train={"epochs": 1}), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    assert losses(run)[-1] < losses(run)[0]
    held = run.read_manifest()["base"]["held_as"]
    assert (held["requested"], held["effective"], held["checkpoint"]) == ("none", word, word)
    proof = merge(input_of_run(run, prepared, Silent()), run.merged, Silent()).proof
    assert json.loads((run.merged / "merge.json").read_text())["quantization"] == word
    assert proof.mean_kl < 1e-3


@pytest.mark.parametrize("word", ["nf4", "q8"])
def test_a_quantized_checkpoint_computes_in_the_type_of_the_recipe(quantized_folders, word):
    model = loaded(quantized_folders[word])
    assert model.dtype == torch.float32
    found = logits(model)
    assert torch.allclose(logits(dequantize(model)), found, atol=1e-6)
    held = summarize_quantization(loaded(quantized_folders[word]))
    assert held.quantization == word
    said = describe_quantization(held, "none", stored_quantization(quantized_folders[word]), "float32")
    assert said.startswith(
        f"model.quantization: none was asked for, {word} is used: the checkpoint is quantized already"
    )


def test_what_a_checkpoint_rules_out_is_refused_with_the_remedy(quantized_folders):
    with pytest.raises(UserError, match=r"model\.quantization: .* are nf4 already and cannot be .* Write none"):
        loaded(quantized_folders["nf4"], "q8")
    with pytest.raises(UserError, match=r"adapter\.kind: none trains the weights themselves"):
        loaded(quantized_folders["nf4"], trainable=True)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("gptq", "pip install optimum gptqmodel"),
        ("awq", "pip install gptqmodel"),
        ("compressed-tensors", "pip install compressed-tensors"),
        ("aqlm", "aqlm already, which lorakit does not train on"),
    ],
)
def test_a_method_that_cannot_be_loaded_here_is_named(tmp_path, tiny_base, method, reason):
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=reason):
        loaded(folder)
    if method in ("gptq", "awq"):
        with pytest.raises(UserError, match="to which no adapter can be added"):
            refuse_irreversible(stored_quantization(folder), "base")


def test_fp8_weights_are_dequantized_and_saved_as_plain_ones(tmp_path, tiny_base):
    """Blocks of 16 x 16 values share a scale, as in DeepSeek's checkpoints."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    weights, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        expected[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        rows, columns = weights[name].shape
        weights |= {name: expected[name], f"{name}_scale_inv": scale.repeat(rows // 16, columns // 16)}
        expected[name] = expected[name].float() * scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = loaded(folder)
    assert summarize_quantization(model) is None
    said = describe_quantization(None, "none", stored_quantization(folder), "float32")
    assert said == "the checkpoint is fp8, dequantized while it was loaded: float32 weights are trained on"
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.allclose(found[name], weight) for name, weight in expected.items())
    assert loaded(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_original_weights_are_those_on_disk(tmp_path, tiny_base):
    name = "model.layers.1.mlp.down_proj"
    on_disk = load_file(tiny_base / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(original_weights(base_of(tiny_base), [name], torch.float32)[name], on_disk)
    made(tmp_path / "gpt2", GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64), torch.bfloat16)
    found = original_weights(base_of(tmp_path / "gpt2"), ["transformer.h.0.mlp.c_fc"], torch.float32)
    assert found["transformer.h.0.mlp.c_fc"].shape == (128, 32)
    assert found["transformer.h.0.mlp.c_fc"].dtype == torch.float32


def test_a_trainable_model_is_in_float32_and_unquantized(tiny_base):
    model = loaded(tiny_base, trainable=True, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_linear_layers_is_not_called_quantized(tmp_path):
    from transformers import BloomConfig

    folder = made(tmp_path / "model", BloomConfig(vocab_size=64, hidden_size=32, n_layer=0, n_head=4))
    with pytest.raises(UserError, match="no layer of this model is one that bitsandbytes quantizes"):
        loaded(folder, "nf4")


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ("none", None, "none"),
        ("none", "nf4", "none was asked for, nf4 is used: the kind of adapter quantizes. nf4: 79%"),
        ("q8", None, "q8: 79% of the parameters are quantized, 163.5 MB instead of 269.0 MB"),
    ],
)
def test_check_says_what_was_asked_for_and_what_is_used(asked, kind, said):
    settings = Model(base=SMOL, dtype="bfloat16", quantization=asked)
    assert quantization_line(settings, kind, find_model_info(SMOL, "main")).startswith(said)
    if said != "none":
        assert "known when the model is here" in quantization_line(settings, kind, None)


def test_check_knows_a_quantized_checkpoint(quantized_folders):
    facts = read_model_info(quantized_folders["nf4"])
    assert facts.stored.quantization == "nf4"
    said = quantization_line(Model(base="x", dtype="float32"), None, facts)
    assert said.startswith("none was asked for, nf4 is used: the checkpoint is quantized already. nf4: the share")
    assert TINY_LLAMA["hidden_size"] == facts.hidden_size
