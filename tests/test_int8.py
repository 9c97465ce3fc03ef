"""Promises on LLM.int8: its layers keep no input for a gradient that nobody asks for."""

import copy

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt

from lorakit.model.fused_lora import release_int8_inputs


def gradient_of(layer, x, computing):
    x = x.clone().requires_grad_()
    with computing(layer):
        output = layer(x)
    kept = getattr(output.grad_fn, "A", None)
    output.square().sum().backward()
    return x.grad, kept


def test_the_gradient_is_the_same_and_no_input_is_kept():
    torch.manual_seed(0)
    layer = Linear8bitLt(32, 16, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(torch.randn(16, 32), requires_grad=False, has_fp16_weights=False).to("cpu")
    x = torch.randn(4, 32)
    usual, kept = gradient_of(copy.deepcopy(layer), x, lambda _: torch.enable_grad())
    assert kept is not None  # else bitsandbytes does so itself, and lorakit's way can go
    lean, kept = gradient_of(layer, x, release_int8_inputs)
    assert kept is None
    assert torch.equal(usual, lean)
    assert "forward" not in vars(layer)
