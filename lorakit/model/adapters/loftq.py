"""LoftQ: the base in NF4, and an adapter that starts from what quantizing took away.

With the quantized weights Q as bitsandbytes makes them from the base, the adapter starts at (nearly) the closest matrix
of its rank to W - Q (Li et al., arXiv 2310.08659, one iteration). Q is then what anyone gets who loads the base in NF4:
the saved adapter needs no base of its own.
"""

from typing import Any

import torch

from lorakit.model.adapters.principal import lora_layers, truncated_svd, weight_of
from lorakit.model.adapters.rank_scheduler import InitContext


def start_loftq(model: Any, context: InitContext) -> None:
    """Let each adapter begin with its module's quantization error; modules that are not quantized keep zero."""
    layers = {name: layer for name, layer in lora_layers(model) if _quantized(layer)}
    context.progress.say("loftq: reading the full-precision weights")
    originals = context.originals(list(layers))
    factors = truncated_svd(16)
    with torch.no_grad(), context.progress.bar("loftq: quantization errors", total=len(layers)) as bar:
        for name, layer in layers.items():
            quantized = weight_of(layer.get_base_layer())
            error = originals.pop(name).to(quantized) - quantized
            rank = layer.r["default"]
            b, a = factors(error, min(rank, min(error.shape)), layer.scaling["default"])
            for weight, found in ((layer.lora_B["default"].weight, b), (layer.lora_A["default"].weight.t(), a.t())):
                weight.zero_()
                weight[:, : found.shape[1]].copy_(found)
            bar.advance(1)


def _quantized(layer: Any) -> bool:
    return not layer.get_base_layer().weight.is_floating_point()
