"""LoRA's linear layer in fewer passes over memory than PEFT's, to the same result within rounding.

PEFT computes `base(x) + B(A(x)) * scaling`: two passes over the layer's output forward and one backward that a matrix
product does on its own when it accumulates. On a CPU these passes are a tenth of a training step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear


@contextmanager
def fused_lora(model: Any) -> Iterator[None]:
    """Within this, the plain LoRA layers of `model` accumulate in place. Nothing of the model is left changed."""
    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, peft_forward: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **named: Any) -> Any:
    (name, *others) = layer.active_adapters
    if args or named or others or not _is_plain(layer, name, x):
        return peft_forward(x, *args, **named)
    flat = x.flatten(0, -2)
    low = layer.lora_A[name](layer.lora_dropout[name](flat))
    high = layer.lora_B[name].weight.t()
    result = layer.base_layer(flat).addmm_(low, high, alpha=layer.scaling[name])
    return result.unflatten(0, x.shape[:-1])


def _is_plain(layer: Any, name: str, x: torch.Tensor) -> bool:
    """One active adapter without a variant of its own, in one number format throughout, its B without a bias."""
    if layer.disable_adapters or layer.merged or name not in layer.lora_A or name in layer.lora_variant:
        return False
    weights = (layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    same = all(weight.dtype == x.dtype for weight in weights) and not torch.is_autocast_enabled(x.device.type)
    return same and layer.lora_B[name].bias is None and type(layer.base_layer) is torch.nn.Linear
