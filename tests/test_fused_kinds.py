"""Every adapter kind on every quantization: what one function a layer computes, against PEFT's forward and backward."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.helpers import disable_input_dtype_casting
from test_adapter_kinds import PAIRS
from test_quantization import base_of, loaded
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.model.adapters import InitContext
from lorakit.model.fused_lora import FUSED_LAYERS, describe_unfused, fused_lora
from lorakit.model.load import original_weights
from lorakit.model.lora_function import frozen_weight
from lorakit.model.peft_adapter import attach_adapter
from lorakit.model.targets import select_targets
from lorakit.progress import Silent
from lorakit.recipe.schema import Adapter
from lorakit.registry import ADAPTERS

KINDS = [pair for pair in PAIRS if pair[0] != "none"]
FAST = [("lora", "nf4"), ("dora", "q8"), ("pissa", "none"), ("adalora", "q4")]
MATRIX = [pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in KINDS]


def batches(count: int = 3):
    generator = torch.Generator().manual_seed(11)
    for _ in range(count):
        ids = torch.randint(3, 90, (4, 24), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def adapted(folder, kind: str, quantization: str, dtype: str, **settings):
    """The model in memory with an adapter of the kind, initialized, and moved so that every factor matters."""
    adapter = Adapter(kind=kind, rank=4, **settings)
    base = loaded(folder, ADAPTERS[kind].quantizes or quantization, dtype=dtype, attention="sdpa")
    context = InitContext(
        lambda: batches(), lambda names: original_weights(base_of(folder), names, torch.float32), Silent()
    )
    model = attach_adapter(base, adapter, 5, select_targets(base, adapter), context)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.std().clamp(min=0.3))
    return model.train()


def logits_and_gradients(model, batch, half=None, seed: int = 5) -> list[torch.Tensor]:
    """The logits, and the gradients of all that is trained."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    kind = half or torch.bfloat16
    with disable_input_dtype_casting(model, active=half is not None), torch.autocast("cpu", kind, enabled=bool(half)):
        output = model(**batch)
    output.loss.backward()
    return [output.logits.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


def both_ways(model, batch, half=None, monkeypatch=None):
    """The same from PEFT's forward, and from that of lorakit."""
    theirs = logits_and_gradients(model, batch, half)
    with monkeypatch.context() as patch, fused_lora(model):
        for kind in FUSED_LAYERS:
            patch.setattr(kind, "forward", None)  # a layer that falls back to PEFT's forward cannot
        mine = logits_and_gradients(model, batch, half)
    assert len(mine) == len(theirs) == 1 + sum(one.requires_grad for one in model.parameters())
    assert [one.dtype for one in mine] == [one.dtype for one in theirs]
    return mine, theirs


def in_float32(model):
    """The same function with nothing rounded: plain float32 weights, those that the base computes with."""
    for layer in model.modules():
        if type(layer) in FUSED_LAYERS and isinstance(layer.base_layer, Linear4bit | Linear8bitLt):
            base = layer.base_layer
            plain = torch.nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            plain.weight.data = frozen_weight(base, model.dtype).float()
            if base.bias is not None:
                plain.bias.data = base.bias.data
            layer.base_layer = plain.requires_grad_(False)
    return model.float()


def result_and_gradients(layer, x, half=None) -> list[torch.Tensor]:
    """A layer's output, and the gradients of x and of all that is trained, of a sum with random weights."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with disable_input_dtype_casting(layer, active=half is not None), torch.autocast("cpu", half, enabled=bool(half)):
        output = layer(x)
    output = output.to(half or output.dtype)  # PEFT's AdaLoRA layers on 8 bits leave float32, its others do not
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (output * weights.to(output.dtype)).sum().backward()
    return [output.detach(), x.grad, *(one.grad.clone() for one in layer.parameters() if one.grad is not None)]


def mean_square(some: list[list[torch.Tensor]], true: list[list[torch.Tensor]]) -> float:
    """The mean of the squared relative errors of some tensors of layers."""
    pairs = [pair for one, exact in zip(some, true, strict=True) for pair in zip(one, exact, strict=True)]
    return sum(
        float((one.double() - exact.double()).norm() / exact.double().norm()) ** 2 for one, exact in pairs
    ) / len(pairs)


def rounding_errors(model, half, wide_inputs=False) -> tuple[float, float]:
    """Mean squared errors of a block's layers in half precision against float32: lorakit's, and PEFT's."""
    layers = [layer for layer in model.modules() if type(layer) in FUSED_LAYERS][:7]
    torch.manual_seed(8)
    kind = torch.float32 if wide_inputs else half
    inputs = [torch.randn(2, 150, layer.in_features).to(half).to(kind) for layer in layers]
    theirs = [result_and_gradients(layer, x, half) for layer, x in zip(layers, inputs, strict=True)]
    with fused_lora(model):
        mine = [result_and_gradients(layer, x, half) for layer, x in zip(layers, inputs, strict=True)]
    in_float32(model)
    true = [result_and_gradients(layer, x.float()) for layer, x in zip(layers, inputs, strict=True)]
    return mean_square(mine, true), mean_square(theirs, true)


@pytest.mark.parametrize(("kind", "quantization"), MATRIX)
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_every_kind_equals_peft_s_in_float32(tiny_base, kind, quantization, dropout, monkeypatch):
    model = adapted(tiny_base, kind, quantization, "float32", dropout=dropout)
    assert describe_unfused(model) is None
    mine, theirs = both_ways(model, next(batches()), None, monkeypatch)
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(("kind", "quantization"), MATRIX)
def test_in_bfloat16_no_kind_is_further_from_float32_than_peft_s(tiny_base, kind, quantization):
    model = adapted(tiny_base, kind, quantization, "bfloat16")
    mine, theirs = rounding_errors(model, torch.bfloat16)
    assert 0 < mine <= 1.05**2 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4", "q8"])
@pytest.mark.parametrize("kind", ["lora", "dora", "flexlora"])
def test_in_float16_none_is_further_from_float32_than_peft_s(tiny_base, kind, quantization):
    model = adapted(tiny_base, kind, quantization, "float16")
    mine, theirs = rounding_errors(model, torch.float16)
    assert 0 < mine <= 1.05**2 * theirs


@pytest.mark.parametrize(("half", "kind"), [(None, "dora"), (torch.bfloat16, "lora")])
def test_layers_of_gpt2_equal_peft_s(tmp_path, half, kind, monkeypatch):
    """Its weights lie the other way round, have biases, and under autocast get inputs in float32."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "gpt2",
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        vocab_size=97,
        **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = adapted(tmp_path, kind, "none", "float32" if half is None else "bfloat16")
    if half is None:
        mine, theirs = both_ways(model, next(batches()), None, monkeypatch)
        assert mean_square([mine], [theirs]) < 1e-10
    else:
        mine, theirs = rounding_errors(model, half, wide_inputs=True)
        assert 0 < mine <= 1.05**2 * theirs
