"""One function a layer on a GPU: PEFT's results from CUDA's kernels, and no waiting for the device."""

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from test_fused_kinds import mean_square
from test_gpu import on_gpu, pytestmark, wide_base  # noqa: F401

from lorakit.model.fused_lora import FUSED_LAYERS, describe_unfused, fused_lora
from lorakit.model.peft_adapter import attach_adapter
from lorakit.model.targets import select_targets
from lorakit.recipe.schema import Adapter


def adapted(folder, kind: str, quantization: str, dropout: float, dtype=torch.bfloat16):
    """The layers of the first block, each with an adapter that adds something."""
    settings = Adapter(kind=kind, rank=8, dropout=dropout)
    base = on_gpu(folder, quantization=quantization, dtype=str(dtype).removeprefix("torch."))
    model = attach_adapter(base, settings, 0, select_targets(base, settings)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, [layer for layer in model.modules() if type(layer) in FUSED_LAYERS][:7]


def results(layer, x, dtype) -> list[torch.Tensor]:
    """The output, and the gradients of x and of all that is trained, under autocast."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    with disable_input_dtype_casting(layer), torch.autocast("cuda", dtype):
        output = layer(x)
    weights = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output).sin()
    (output * weights.to(output.dtype)).sum().backward()
    return [output.detach(), x.grad, *(one.grad.clone() for one in layer.parameters() if one.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantization", ["none", "q8", "q4", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora", "flexlora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_give_what_peft_s_do(wide_base, kind, quantization, dropout, dtype):  # noqa: F811
    model, layers = adapted(wide_base, kind, quantization, dropout, dtype)
    assert describe_unfused(model) is None
    inputs = [torch.randn(2, 96, layer.in_features, device="cuda", dtype=dtype) for layer in layers]
    theirs = [results(layer, x, dtype) for layer, x in zip(layers, inputs, strict=True)]
    with fused_lora(model):
        mine = [results(layer, x, dtype) for layer, x in zip(layers, inputs, strict=True)]
    assert [len(one) for one in mine] == [len(one) for one in theirs]
    assert mean_square(mine, theirs) < (0.02 if kind == "dora" else 0.01) ** 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_pass_does_not_wait_for_the_device(wide_base, kind, quantization):  # noqa: F811
    model, layers = adapted(wide_base, kind, quantization, 0.0)
    x = torch.randn(2, 96, layers[0].in_features, device="cuda", dtype=torch.bfloat16)
    with fused_lora(model):
        results(layers[0], x, torch.bfloat16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(layers[0], x, torch.bfloat16)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_backward_keeps_the_input_alone(wide_base):  # noqa: F811
    model, layers = adapted(wide_base, "lora", "nf4", 0.0)
    x = torch.randn(2, 4096, layers[0].in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with fused_lora(model), torch.autocast("cuda", torch.bfloat16):
        layers[0](x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = layers[0](x)
        assert torch.cuda.memory_allocated() - before <= output.nbytes + (1 << 20)
