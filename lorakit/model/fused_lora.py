"""Adapters' linear layers in fewer passes over memory than PEFT's, to the same result within rounding.

PEFT computes `base(x) + B(A(x)) * scaling`: two passes over the layer's output forward and one backward that a matrix
product does on its own when it accumulates. On a CPU these passes are a tenth of a training step. DoRA: see dora.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import bnb
from peft.tuners.lora.layer import Linear
from transformers.pytorch_utils import Conv1D

from lorakit.model.dora import RowNorms, dora_forward, has_dora

FUSED_LAYERS = (Linear, bnb.Linear4bit, bnb.Linear8bitLt)


@contextmanager
def fused_lora(model: Any) -> Iterator[None]:
    """Within this, the LoRA and DoRA layers of `model` accumulate in place; afterwards the model is as it was."""
    layers = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward, RowNorms())
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(
    layer: Any, peft_forward: Callable[..., torch.Tensor], norms: RowNorms, x: torch.Tensor, *args: Any, **named: Any
) -> Any:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or named or not names or not _is_exact(layer, names, x):
        return peft_forward(x, *args, **named)
    flat = x.flatten(0, -2)
    if names[0] in layer.lora_variant:
        result = dora_forward(layer, names[0], flat, norms)
    else:
        result = layer.base_layer(flat)
        for name in names:
            low = layer.lora_A[name](layer.lora_dropout[name](flat))
            result = result.addmm_(low, layer.lora_B[name].weight.t(), alpha=layer.scaling[name])
    return result.unflatten(0, x.shape[:-1])


def _is_exact(layer: Any, names: list[str], x: torch.Tensor) -> bool:
    """Plain active adapters, or one that is DoRA, in one number format throughout, their B without a bias."""
    if layer.disable_adapters or layer.merged or torch.is_autocast_enabled(x.device.type):
        return False
    if any(name in layer.lora_variant for name in names) and (len(names) > 1 or not has_dora(layer, names[0])):
        return False
    weights = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in names]
    if any(weight.dtype != x.dtype for weight in weights) or any(layer.lora_B[name].bias is not None for name in names):
        return False
    return _base_is_exact(layer.base_layer, x)


def _base_is_exact(base: Any, x: torch.Tensor) -> bool:
    """Whether the base is of a kind that computes in x's number format."""
    if type(base) in (torch.nn.Linear, Conv1D):
        return bool(base.weight.dtype == x.dtype)
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if type(base) is Linear4bit:
        return on_cpu and base.weight.quant_state.dtype == x.dtype and base.compute_dtype in (None, x.dtype)
    return type(base) is Linear8bitLt and on_cpu and base.weight.dtype == torch.int8
