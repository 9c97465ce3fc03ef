"""Promises of `lorakit extract`: a LoRA out of two checkpoints, and what it keeps is told."""

import json

import pytest
import torch
from model_families import FAMILIES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorakit.errors import UserError
from lorakit.merge.extract import extract
from lorakit.merge.low_rank import truncate_to_rank
from lorakit.model.low_rank import squared_norm
from lorakit.model.peft_adapter import load_adapter
from lorakit.model.resolve import Base
from lorakit.model.spec_from_meta import list_weights
from lorakit.progress import Silent

EXTRACTED = [
    *(
        "llama",
        "qwen2",
        "gemma3-text",
        "phi3",
        "gpt2",
        "gpt-neox",
        "falcon",
        "mixtral",
        "qwen2-moe",
        "gpt-oss",
        "mamba",
    ),
    *("jamba", "llama4", "granite-moe"),
]


class Heard(Silent):
    """A listener that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    warn = say


def saved(model, folder, name="base"):
    model.save_pretrained(folder / name)
    return Base(name, folder / name, "local folder")


def changed(model, paths, size=0.05):
    """Noise on some weights of a model."""
    generator = torch.Generator().manual_seed(5)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for path in paths:
            state[path].add_(torch.randn(state[path].shape, generator=generator), alpha=size)
    return model


def linear_paths(model):
    """The paths of all weights that a LoRA can hold."""
    weights = [weight for weight in list_weights(model) if not weight.unadaptable]
    return [weight.path if weight.fused else f"{weight.path}.weight" for weight in weights]


def logits(model):
    ids = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def with_adapter(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    return load_adapter(model.requires_grad_(False), folder)


def assert_near(found, wanted, share=1e-4):
    assert (found - wanted).abs().max() <= share * wanted.abs().max()


@pytest.fixture
def llama(tmp_path):
    """A random Llama, in memory and as a folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    return model, saved(model, tmp_path)


@pytest.mark.parametrize("name", EXTRACTED)
def test_with_full_rank_the_base_with_the_adapter_is_the_tuned_model(name, tmp_path):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(FAMILIES[name].config).float()
    base = saved(model, tmp_path)
    before = logits(model.eval())
    paths = linear_paths(model)
    wanted = logits(changed(model, paths))
    tuned = saved(model, tmp_path, "tuned")
    result = extract(tuned, base, 64, tmp_path / "lora", Silent())
    assert {one["path"] for one in result["taken"]} == set(paths) and not result["left"]
    assert result["kept"] == pytest.approx(1, abs=1e-6)
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert_near(logits(with_adapter(base, tmp_path / "lora")), wanted)
    assert base.name == json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("tied", [True, False])
def test_norms_embeddings_and_head_are_brought_whole_when_asked_for(tied, tmp_path):
    torch.manual_seed(2)
    config = FAMILIES["llama"].config
    config = type(config)(**{**config.to_dict(), "tie_word_embeddings": tied})
    model = LlamaForCausalLM(config).eval()
    base = saved(model, tmp_path)
    wanted = logits(changed(model, [name for name, _ in model.named_parameters()]))
    tuned = saved(model, tmp_path, "tuned")
    result = extract(tuned, base, 64, tmp_path / "lora", Silent(), keep_whole=True)
    assert {"model.embed_tokens", "lm_head", "model.norm", "model.layers.0.input_layernorm"} <= set(result["whole"])
    assert not result["left"] and result["kept"] == pytest.approx(1, abs=1e-6)
    assert_near(logits(with_adapter(base, tmp_path / "lora")), wanted)


def test_what_a_lora_cannot_hold_is_named_with_its_share(llama, tmp_path):
    model, base = llama
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    layer, beside = "model.layers.0.mlp.up_proj.weight", ["model.norm.weight", "model.embed_tokens.weight"]
    tuned = saved(changed(model, [layer, *beside]), tmp_path, "tuned")
    sizes = {name: float((value.detach() - before[name]).norm() ** 2) for name, value in model.named_parameters()}
    result = extract(tuned, base, 32, tmp_path / "lora", Silent())
    assert [one["path"] for one in result["left"]] == sorted(beside, key=lambda path: -sizes[path])
    for one in (*result["left"], *result["taken"]):
        assert one["change"] == pytest.approx(sizes[one["path"]] / sum(sizes.values()), rel=1e-4)
    assert result["kept"] == pytest.approx(sizes[layer] / sum(sizes.values()), rel=1e-4)
    assert result["kept_of_layers"] == pytest.approx(1, abs=1e-5)
    reasons = {one["path"]: one["reason"] for one in result["left"]}
    assert all("not the weight of a linear layer" in reasons[path] for path in beside)
    assert result["unchanged"] == len(sizes) - 3
    names = {name.split(".lora_")[0] for name in load_file(tmp_path / "lora" / "adapter_model.safetensors")}
    assert names == {f"base_model.model.{layer.removesuffix('.weight')}"}


def test_a_planted_change_of_rank_three_is_found_whole_and_more_rank_keeps_more(llama, tmp_path):
    model, base = llama
    weight = model.model.layers[1].self_attn.q_proj.weight
    generator = torch.Generator().manual_seed(9)
    planted = torch.randn(32, 3, generator=generator) @ torch.randn(3, 32, generator=generator) * 0.01
    weight.data += planted
    tuned = saved(model, tmp_path, "tuned")
    values = torch.linalg.svdvals(planted.double()) ** 2
    for rank in (1, 2, 3):
        (only,) = extract(tuned, base, rank, tmp_path / "lora", Silent())["taken"]
        assert only["kept"] == pytest.approx(float(values[:rank].sum() / values.sum()), abs=1e-5)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    product = tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
    assert_near(product, planted)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and not config["use_rslora"]


def test_the_share_told_is_the_share_that_the_written_adapter_holds(llama, tmp_path):
    model, base = llama
    before = {path: dict(model.named_parameters())[path].detach().clone() for path in linear_paths(model)}
    changed(model, before)
    tuned = saved(model, tmp_path, "tuned")
    result = extract(tuned, base, 4, tmp_path / "lora", Silent())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    held, whole = 0.0, 0.0
    for path, weight in before.items():
        stem = f"base_model.model.{path.removesuffix('.weight')}.lora_"
        product = tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
        change = dict(model.named_parameters())[path].detach() - weight
        (one,) = [one for one in result["taken"] if one["path"] == path]
        assert one["kept"] == pytest.approx(float(1 - (change - product).norm() ** 2 / change.norm() ** 2), abs=1e-4)
        held, whole = held + float(product.norm() ** 2), whole + float(change.norm() ** 2)
    assert result["kept"] == result["kept_of_layers"] == pytest.approx(held / whole, rel=1e-4)
    facts = json.loads((tmp_path / "lora" / "extract.json").read_text())
    assert facts["kept"] == result["kept"] and "model.safetensors" in facts["tuned"]["sha256"]


def test_layers_smaller_than_the_rank_get_as_much_as_they_have_and_it_is_said(llama, tmp_path):
    model, base = llama
    heard = Heard()
    tuned = saved(changed(model, linear_paths(model)), tmp_path, "tuned")
    result = extract(tuned, base, 40, tmp_path / "lora", heard)
    assert {one["rank"] for one in result["taken"]} == {32}
    assert any("fewer than 40 rows or columns" in line for line in heard.lines)


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (30, 70), (70, 30)])
@pytest.mark.parametrize("rank", [1, 7, 30, 99])
def test_the_directions_kept_are_the_largest_singular_ones(rows, columns, rank):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rank))
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    found, rank = truncate_to_rank(matrix, rank), min(rank, rows, columns)
    assert_near((found.b @ found.a).double(), (u[:, :rank] * s[:rank]) @ vh[:rank], 1e-5)
    assert squared_norm([(found, 1.0)]) == pytest.approx(float((s[:rank] ** 2).sum()), rel=1e-5)
    halves = (found.b.norm(dim=0), found.a.norm(dim=1))
    assert torch.allclose(*halves, rtol=1e-3) and found.b.shape[1] == len(found.a) == rank


def test_directions_that_a_matrix_lacks_are_zero():
    matrix = torch.outer(torch.arange(5.0), torch.arange(9.0))
    found = truncate_to_rank(matrix, 4)
    assert found.a.isfinite().all() and found.b.isfinite().all()
    assert_near(found.b @ found.a, matrix, 1e-5)


def test_the_randomized_directions_keep_what_the_exact_ones_do_and_repeat_themselves(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    values = 0.97 ** torch.arange(300)
    left, right = (torch.linalg.qr(torch.randn(400, 300, generator=generator))[0] for _ in range(2))
    matrix = (left * values) @ right.T
    exact = truncate_to_rank(matrix, 16)
    monkeypatch.setattr("lorakit.merge.low_rank._EXACT_SIDE", 100)
    state = torch.get_rng_state()
    one, two = truncate_to_rank(matrix, 16), truncate_to_rank(matrix, 16)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b) and not torch.equal(one.a, exact.a)
    assert squared_norm([(one, 1.0)]) == pytest.approx(squared_norm([(exact, 1.0)]), rel=1e-3)
    lost = float((matrix - one.b @ one.a).double().norm() ** 2)
    assert lost == pytest.approx(float((values**2).sum()) - squared_norm([(one, 1.0)]), rel=1e-3)


def refused(text, *arguments):
    with pytest.raises(UserError, match=text):
        extract(*arguments)
    assert not arguments[3].exists()


def test_what_cannot_be_extracted_is_one_clear_error(llama, tmp_path):
    model, base = llama
    output, quiet = tmp_path / "lora", Silent()
    refused("the same weights", base, base, 4, output, quiet)
    other = saved(AutoModelForCausalLM.from_config(FAMILIES["mistral"].config), tmp_path, "other")
    refused("model_type and .* more is mistral in the one and llama in the other", other, base, 4, output, quiet)
    shallow = LlamaForCausalLM(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 1}))
    refused("not checkpoints of one model", saved(shallow, tmp_path, "shallow"), base, 4, output, quiet)
    tied = LlamaForCausalLM(type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": True}))
    refused("lm_head.weight is not in the one", saved(tied, tmp_path, "tied"), base, 4, output, quiet)
    norm = saved(changed(model, ["model.norm.weight"]), tmp_path, "norm")
    refused("no linear layer differs .* only model.norm.weight", norm, base, 4, output, quiet)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    refused(
        "nan: model.layers.0.mlp.up_proj.weight holds numbers that are not",
        saved(model, tmp_path, "nan"),
        base,
        4,
        output,
        quiet,
    )
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 0
    model.resize_token_embeddings(70)
    refused(
        r"embed_tokens.weight and .* is \(70, 32\) in the one and \(64, 32\) in the other.*the vocabulary was resized",
        saved(model, tmp_path, "resized"),
        base,
        4,
        output,
        quiet,
    )


def test_a_quantized_checkpoint_is_refused(llama, tmp_path):
    _, base = llama
    config = json.loads((base.folder / "config.json").read_text())
    (base.folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused("its weights are fp8", base, base, 4, tmp_path / "lora", Silent())


def test_tokenizers_are_compared_and_the_tuned_one_comes_with_the_adapter(llama, tmp_path, tokenizer, tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    base, tuned = Base("base", tiny_base, "local folder"), saved(changed(model, linear_paths(model)), tmp_path, "tuned")
    heard = Heard()
    extract(tuned, base, 2, tmp_path / "lora", heard)
    assert any("tuned has no tokenizer" in line for line in heard.lines)
    again = AutoTokenizer.from_pretrained(tiny_base)
    again.chat_template = "{{ messages[0]['content'] }}"
    again.save_pretrained(tuned.folder)
    heard = Heard()
    extract(tuned, base, 2, tmp_path / "lora", heard)
    assert any("tokenizer of tuned, which has another chat template" in line for line in heard.lines)
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").chat_template == again.chat_template
    text = json.loads((tuned.folder / "tokenizer.json").read_text())
    names = sorted(text["model"]["vocab"], key=text["model"]["vocab"].get)[-2:]
    one, two = (text["model"]["vocab"][name] for name in names)
    text["model"]["vocab"] |= {names[0]: two, names[1]: one}
    (tuned.folder / "tokenizer.json").write_text(json.dumps(text))
    refused("different tokenizers", tuned, base, 2, tmp_path / "other", Silent())


def test_checkpoints_of_two_types_are_said_to_differ_by_rounding_too(llama, tmp_path):
    model, base = llama
    changed(model, linear_paths(model))
    heard = Heard()
    tuned = saved(model.to(torch.bfloat16), tmp_path, "tuned")
    extract(tuned, base, 4, tmp_path / "lora", heard)
    assert any("stored in bfloat16, base in float32" in line for line in heard.lines)


def test_settings_that_no_adapter_holds_are_told(llama, tmp_path):
    model, base = llama
    tuned = saved(changed(model, linear_paths(model)[:1]), tmp_path, "tuned")
    facts = json.loads((tuned.folder / "config.json").read_text())
    (tuned.folder / "config.json").write_text(json.dumps(facts | {"rms_norm_eps": 0.5, "eos_token_id": 7}))
    heard = Heard()
    extract(tuned, base, 4, tmp_path / "lora", heard)
    (told,) = [line for line in heard.lines if "config.json" in line]
    assert "rms_norm_eps: 0.5" in told and "eos" not in told
