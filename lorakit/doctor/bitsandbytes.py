"""bitsandbytes, by real calls on the device of a run: layers forward and backward, and a step of an optimizer."""

from collections.abc import Iterator
from typing import Any

from lorakit.doctor.check import DoctorFinding, broken, ok, require_import, root_cause

_WIDTH, _ROWS, _RATE = 256, 32, 0.01
_REMEDY = "pip install --force-reinstall bitsandbytes; python -m bitsandbytes says more"
# Quantization -> the largest relative error of a product that is no fault. Gaussian weights lose 0.092 in NF4, 0.122 in
# FP4 and 0.008 in int8, to which CUDA adds as much for the inputs.
_LARGEST_ERROR = {"nf4": 0.12, "q4": 0.16, "q8": 0.03}


def check_bitsandbytes() -> Iterator[DoctorFinding]:
    """A quantized layer of each kind against the product with the plain weight, and a step of the 8-bit optimizer."""
    require_import("torch", "bitsandbytes")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for quantization, limit in _LARGEST_ERROR.items():
        try:
            forward, backward = _layer_errors(quantization, device)
        except Exception as error:  # a broken build raises all sorts of errors: each kind is tried for itself
            message = f"a layer on {device} fails: {type(error).__name__}: {root_cause(error)}"
            yield broken(quantization, message, _REMEDY)
            continue
        message = f"on {device} the relative error is {forward:.3f} forward, {backward:.3f} backward"
        figures = {"forward": forward, "backward": backward}
        if max(forward, backward) <= limit:
            yield ok(quantization, message, **figures)
        else:
            yield broken(quantization, f"{message}: over {limit}", _REMEDY, **figures)
    moved = _first_step(device)
    message = f"a first step on {device} moves by {moved:.4g} at a learning rate of {_RATE}"
    fine = abs(moved - _RATE) < 0.1 * _RATE
    yield ok("adamw-8bit", message) if fine else broken("adamw-8bit", f"{message}, by which it should", _REMEDY)


def _first_step(device: str) -> float:
    """How far the first step of the 8-bit optimizer moves a number: by the learning rate, where it is right."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    before = torch.randn(8192, generator=torch.Generator().manual_seed(0)).to(device)
    trained = torch.nn.Parameter(before.clone())
    optimizer = AdamW8bit([trained], lr=_RATE, weight_decay=0.0)
    (trained**2).sum().backward()
    optimizer.step()
    return float((trained.detach() - before).abs().mean())


def _layer_errors(quantization: str, device: str) -> tuple[float, float]:
    """The relative errors of a quantized layer's output and of the gradient of its input, on random weights."""
    import torch

    dtype = torch.float16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
    layer = _quantized_layer(quantization, weight, dtype).to(device)
    inputs = torch.randn(_ROWS, _WIDTH, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(_ROWS, _WIDTH, generator=generator).to(device, dtype)
    outputs = layer(inputs)
    outputs.backward(gradient)
    plain = weight.to(device)
    pairs = ((outputs, inputs.detach().float() @ plain.T), (inputs.grad, gradient.float() @ plain))
    forward, backward = (float((computed.float() - exact).norm() / exact.norm()) for computed, exact in pairs)
    return forward, backward


def _quantized_layer(quantization: str, weight: Any, dtype: Any) -> Any:
    """A layer that quantizes the weight when it is moved to its device, as a model's layers do."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    if quantization == "q8":
        layer = Linear8bitLt(_WIDTH, _WIDTH, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        return layer
    kind = "fp4" if quantization == "q4" else quantization
    layer = Linear4bit(_WIDTH, _WIDTH, bias=False, quant_type=kind, compute_dtype=dtype)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
    return layer
