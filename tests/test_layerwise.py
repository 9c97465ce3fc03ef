"""Promises of the streamed model: it computes what the model in memory does, and holds one block of it at a time."""

import weakref
from dataclasses import dataclass

import pytest
import torch
from model_families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.model.layerwise import layerwise_model
from lorakit.model.loss import body_of, head_logits

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([7, 8]), 0)


@dataclass
class Source:
    """What `read` is in the tests: fresh copies from a state dict, each watched until it is dropped."""

    state: dict
    asked: list
    living: list

    def __call__(self, path):
        tensor = self.state[path].clone()
        self.asked.append(path)
        self.living.append((path, weakref.ref(tensor.untyped_storage()), weakref.ref(tensor)))
        return tensor


def base_of(config, folder):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        for buffer in dict(model.named_buffers()).keys() & model.state_dict().keys():
            model.get_buffer(buffer).normal_()
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def source_of(model):
    first = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in first}  # a tied weight once
    return Source(state, [], [])


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


def assert_same(found, wanted):
    assert wanted.isfinite().all()
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_does_in_memory(family, tmp_path):
    model = base_of(FAMILIES[family].config, tmp_path)
    streamed = layerwise_model(tmp_path, "eager", source_of(model))
    wanted = logits(model)
    assert_same(logits(streamed), wanted)
    assert_same(logits(streamed), wanted)


LLAMA, TIED = (
    FAMILIES["llama"].config,
    type(FAMILIES["llama"].config)(**{**FAMILIES["llama"].config.to_dict(), "tie_word_embeddings": True}),
)
EXPERTS = ["gate_up_proj", "down_proj"]
ADAPTERS = {
    "lora, with patterns": (
        LLAMA,
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 40}},
    ),
    "rslora": (LLAMA, {"target_modules": "all-linear", "use_rslora": True}),
    "dora": (LLAMA, {"target_modules": "all-linear", "use_dora": True}),
    "dora on Conv1D": (FAMILIES["gpt2"].config, {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "embeddings and head": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora on embeddings and head": (LLAMA, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "experts": (
        FAMILIES["qwen3-moe"].config,
        {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{name}" for name in EXPERTS]},
    ),
    "experts stored the other way": (
        FAMILIES["gpt-oss"].config,
        {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{name}" for name in EXPERTS]},
    ),
    "state space": (FAMILIES["mamba"].config, {"target_modules": ["in_proj"]}),
    "embeddings whole": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "tied embeddings whole": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "a norm in the blocks whole": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "biases": (FAMILIES["gpt2"].config, {"target_modules": ["c_attn"], "bias": "all"}),
}


def adapter_of(folder, config, **settings):
    """An adapter whose tensors are all random, saved; and the base that it belongs to."""
    base = base_of(config, folder / "base")
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_what_peft_computes_in_memory(name, tmp_path):
    config, settings = ADAPTERS[name]
    base = adapter_of(tmp_path, config, **settings)
    source, plain = source_of(base.eval()), logits(base)
    source.state = {path: tensor.clone() for path, tensor in source.state.items()}
    streamed = layerwise_model(tmp_path / "base", "eager", source, adapter=tmp_path / "adapter")
    wanted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert float((wanted - plain).abs().max()) > 1e-2 * float(wanted.abs().max()), "the adapter does something"
    assert_same(logits(streamed), wanted)
    assert_same(logits(streamed), wanted)
    assert set(source.asked) <= source.state.keys()


def living(source):
    return {path for path, storage, _ in source.living if storage() is not None}


def part_of(path):
    """The block of a weight, or the weight's own module where it is in none."""
    parts = path.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])


@pytest.mark.parametrize("name", ["rslora", "dora", "experts", "dora on embeddings and head", "tied embeddings whole"])
def test_never_more_than_one_block_of_weights_lives(name, tmp_path):
    config, settings = ADAPTERS[name]
    source = source_of(adapter_of(tmp_path, config, **settings))

    def counting(path):
        tensor = source(path)
        assert {part_of(other) for other in living(source)} == {part_of(path)}
        return tensor

    streamed = layerwise_model(tmp_path / "base", "eager", counting, adapter=tmp_path / "adapter")
    logits(streamed)
    assert len(source.asked) >= 2 * 8, "the blocks were read"
    assert living(source) == set()
    with torch.enable_grad():
        answer = streamed(input_ids=IDS, use_cache=False).logits
    assert living(source) == set(), "no graph holds what was read"
    assert not answer.requires_grad


def test_what_an_adapter_replaces_is_not_read(tmp_path):
    config, settings = ADAPTERS["embeddings whole"]
    source = source_of(adapter_of(tmp_path, config, **settings))
    logits(layerwise_model(tmp_path / "base", "eager", source, adapter=tmp_path / "adapter"))
    assert {path for path in source.asked if ".layers." not in path} == set()


def test_a_forward_reads_each_weight_once_and_tied_ones_by_the_embeddings_name(tmp_path):
    source = source_of(base_of(TIED, tmp_path))
    logits(layerwise_model(tmp_path, "eager", source))
    assert source.asked.count("model.embed_tokens.weight") == 2  # as embeddings, and as head
    others = [path for path in source.asked if path != "model.embed_tokens.weight"]
    assert sorted(others) == sorted(source.state.keys() - {"model.embed_tokens.weight", "lm_head.weight"})


def test_the_head_works_by_itself(tmp_path):
    model = base_of(TIED, tmp_path)
    source = source_of(model)
    streamed = layerwise_model(tmp_path, "eager", source)
    with torch.inference_mode():
        output = body_of(model)(input_ids=IDS, use_cache=False)
        hidden = output.last_hidden_state[0]
        assert_same(streamed.get_output_embeddings()(hidden), model.lm_head(hidden))
        assert_same(head_logits(streamed, output, hidden), model.lm_head(hidden))
    assert set(source.asked) == {"model.embed_tokens.weight"}
    assert streamed.device.type == "cpu"


@pytest.mark.parametrize("where", ["reading", "computing"])
def test_an_error_on_the_way_frees_what_was_read(where, tmp_path):
    source = source_of(base_of(LLAMA, tmp_path))
    broken = "model.layers.1.mlp.down_proj.weight"
    intact, source.state[broken] = source.state[broken], source.state[broken][:, :3]

    def read(path):
        if where == "reading" and path == broken:
            raise OSError("the disk is gone")
        return source(path)

    streamed = layerwise_model(tmp_path, "eager", read)
    with pytest.raises((OSError, RuntimeError)):
        logits(streamed)
    assert living(source) == set()
    assert all(parameter.isnan().all() for parameter in streamed.parameters())
    source.state[broken], where = intact, "nowhere"
    assert logits(streamed).isfinite().all()


def test_the_config_s_own_quantization_is_no_matter(tmp_path):
    model = base_of(LLAMA, tmp_path)
    config = type(LLAMA).from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(tmp_path)
    assert_same(logits(layerwise_model(tmp_path, "eager", source_of(model))), logits(model))


def test_an_adapter_that_changed_its_base_is_refused(tmp_path):
    base = base_of(LLAMA, tmp_path / "base")
    made = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora"))
    made.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="init_lora_weights 'olora'"):
        layerwise_model(tmp_path / "base", "eager", source_of(base), adapter=tmp_path / "adapter")


def test_an_adapter_of_another_shape_or_a_damaged_one_is_one_clear_error(tmp_path):
    base = adapter_of(tmp_path, LLAMA, target_modules=["q_proj"])
    wide = type(LLAMA)(**{**LLAMA.to_dict(), "hidden_size": 32})
    wide.save_pretrained(tmp_path / "wide")
    for folder, says in (("wide", "cannot be put on the base model"), ("base", "this weights file is damaged")):
        with pytest.raises(UserError, match=says):
            layerwise_model(tmp_path / folder, "eager", source_of(base), adapter=tmp_path / "adapter")
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "base" / "config.json").write_text('{"model_type": "no such family"}')
    with pytest.raises(UserError, match="can make no causal language model of this config"):
        layerwise_model(tmp_path / "base", "eager", source_of(base))
