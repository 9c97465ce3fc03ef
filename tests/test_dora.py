"""DoRA by the factored norm equals PEFT's, layer by layer and over a whole training; what is saved is plain PEFT."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import TINY_LLAMA
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lorakit.model.dora import factored_norms
from lorakit.model.fused_lora import FUSED_LAYERS, fused_lora

IN, OUT = 24, 40


def linear(bias: bool) -> torch.nn.Module:
    return torch.nn.Linear(IN, OUT, bias=bias)


def conv1d(bias: bool) -> torch.nn.Module:
    made = Conv1D(OUT, IN)  # always has one
    torch.nn.init.normal_(made.bias, std=float(bias))
    return made


def four_bits(bias: bool) -> torch.nn.Module:
    made = Linear4bit(64, OUT, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict({"weight": torch.randn(OUT, 64), **({"bias": torch.randn(OUT)} if bias else {})})
    return made.to("cpu")


def eight_bits(bias: bool) -> torch.nn.Module:
    made = Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
    made.load_state_dict({"weight": torch.randn(OUT, IN), **({"bias": torch.randn(OUT)} if bias else {})})
    return made.to("cpu")


BASES = {"linear": linear, "conv1d": conv1d, "4 bits": four_bits, "8 bits": eight_bits}


class One(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapted(layer: torch.nn.Module, dropout: float = 0.0, **settings) -> torch.nn.Module:
    """One layer with a random DoRA adapter, magnitudes unlike the norms."""
    model = One(layer)
    model.is_loaded_in_8bit = isinstance(layer, Linear8bitLt)
    config = LoraConfig(r=4, lora_alpha=7, lora_dropout=dropout, target_modules=["layer"], use_dora=True, **settings)
    made = get_peft_model(model, config).train()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def tiny_dora(**settings) -> torch.nn.Module:
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, **TINY_LLAMA))
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made.train()


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 97, (rows, 11), generator=torch.Generator().manual_seed(rows))


def result_and_gradients(model, x) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of everything trained, of a weighted sum of the output."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    output = model(x)
    (output * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(mine, theirs, tolerance=2e-5):
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize(("training", "dropout"), [(True, 0.0), (True, 0.4), (False, 0.4)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_gives_peft_s_result_and_gradients(base, bias, training, dropout, monkeypatch):
    models = []
    for _ in range(2):  # PEFT's forward leaves an 8-bit layer on a CPU unfit for another one
        torch.manual_seed(3)
        models.append(adapted(BASES[base](bias), dropout, fan_in_fan_out=base == "conv1d").train(training))
    x = torch.randn(2, 5, 64 if base == "4 bits" else IN)
    theirs = result_and_gradients(models[0], x)
    assert len(theirs) == 5, "output, x, A, B, magnitude"
    for kind in FUSED_LAYERS:
        monkeypatch.setattr(kind, "forward", None)  # a layer that falls back to PEFT's forward cannot
    with fused_lora(models[1]):
        mine = result_and_gradients(models[1], x)
        again = result_and_gradients(models[1], x)
    assert_same(mine, theirs)
    assert all(torch.equal(one, other) for one, other in zip(mine, again, strict=True))


def test_the_factored_norm_is_the_norm_where_the_terms_cancel():
    generator = torch.Generator().manual_seed(9)
    for trial in range(40):
        a = torch.randn(3, 50, generator=generator) * 10.0 ** (trial % 5 - 2)
        b = torch.randn(30, 3, generator=generator)
        # Rows of the sum go from as large as their terms down to a millionth of them, and to nothing.
        left = torch.logspace(0, -6, 30)[:, None].where(torch.arange(30)[:, None] < 28, 0.0)
        apart = torch.randn(30, 50, generator=generator) * (0.5 * b @ a).norm(dim=1, keepdim=True) / 7
        weight = -0.5 * b @ a + left * apart
        norms = factored_norms(weight, weight.square().sum(1), a, b, 0.5)
        true = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
        direct = (weight + 0.5 * b @ a).norm(dim=1)
        terms = weight.norm(dim=1)
        assert ((norms - true).abs() <= 2e-6 * true + 1e-6 * terms).all()
        assert ((norms - true).abs() <= 4 * (direct - true).abs() + 2e-6 * true + 2e-7 * terms).all()


def test_a_whole_model_trains_as_with_peft():
    theirs, mine = tiny_dora(), tiny_dora()
    trained = {}
    for model, context in ((theirs, None), (mine, fused_lora(mine))):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
        if context:
            context.__enter__()
        for step in range(5):
            ids = tokens(2 + step % 2)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if context:
            context.__exit__(None, None, None)
        trained[model] = [p.detach() for p in model.parameters() if p.requires_grad]
    assert_same(trained[mine], trained[theirs], tolerance=1e-4)
    before = [p for p in tiny_dora().parameters() if p.requires_grad]
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(trained[mine], before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, ids = tiny_dora(), tokens()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        with fused_lora(model):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert_same(gradients[1], gradients[0], tolerance=1e-6)


@pytest.mark.parametrize("change", ["base", "adapter", "behind the version's back"])
def test_a_weight_that_changes_between_steps_is_noticed(change):
    torch.manual_seed(3)
    model, x = adapted(linear(True)), torch.randn(4, IN)
    layer = model.base_model.model.layer
    with fused_lora(model):
        result_and_gradients(model, x)
        if change == "base":
            with torch.no_grad():
                layer.base_layer.weight.mul_(3)
        elif change == "adapter":
            with torch.no_grad():
                model(x)
                layer.lora_B["default"].weight.mul_(3)
        else:
            layer.lora_B["default"].weight.detach().numpy()[:] *= 3
        mine = result_and_gradients(model, x)
    assert_same(mine, result_and_gradients(model, x))


def test_disabled_and_merged_layers_are_peft_s_own():
    torch.manual_seed(3)
    model, x = adapted(linear(True)), torch.randn(4, IN)
    with torch.no_grad():
        with model.disable_adapter():
            disabled = model(x)
        with fused_lora(model):
            with model.disable_adapter():
                assert torch.equal(model(x), disabled)
            plain = model(x)
            model.merge_adapter()
            assert torch.allclose(model(x), plain, atol=1e-5)
            model.unmerge_adapter()
            assert torch.allclose(model(x), plain, atol=1e-5)


def test_a_trained_adapter_is_saved_as_plain_peft(tmp_path):
    model, ids = tiny_dora(), tokens()
    base = copy.deepcopy(model).unload()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with fused_lora(model):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert loaded.peft_config["default"].use_dora
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, logits, atol=1e-5)


def test_nothing_of_the_model_is_left_changed():
    model, ids = tiny_dora(), tokens()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attributes = [set(vars(module)) for module in model.modules()]
    with fused_lora(model):
        model(input_ids=ids, labels=ids).loss.backward()
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
