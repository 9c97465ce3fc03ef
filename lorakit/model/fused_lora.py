"""Adapters' linear layers in fewer passes over memory than PEFT's, to the same result within rounding, in every number
format and on plain and bitsandbytes' weights: LoRA (model/lora_function.py), the B diag(E) A of AdaLoRA's layers, which
is LoRA with the factor E A, and DoRA (model/dora.py). A layer that has something else keeps PEFT's forward.

The base's own forward is called wherever one exists, so that its numbers are the library's: on a GPU bitsandbytes
rounds the inputs of int8 layers, and multiplies few tokens with 4 bits in a kernel of its own. The backward pass of a
frozen base is computed here from its dequantized weight, as the libraries do. A base that has hooks, or weights that
are trained, keeps its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners import adalora
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import bnb
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor

from lorakit.model.dora import DoraProducts, RowNorms, dora, row_norms
from lorakit.model.lora_function import OWN_BASES, Casts, LoraProducts, casts_of_steps, lora
from lorakit.model.token_rows import TokenRows, token_layers

FUSED_LAYERS = (
    Linear,
    bnb.Linear4bit,
    bnb.Linear8bitLt,
    adalora.SVDLinear,
    adalora.SVDLinear4bit,
    adalora.SVDLinear8bitLt,
)


@contextmanager
def replace_forward(layers: list[Any], make: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Within this, the forward of each layer is what `make` gives for it; afterwards it is what it was."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = make(layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@contextmanager
def fused_lora(model: Any, norms: Callable[..., Tensor] = row_norms) -> Iterator[None]:
    """Within this, the LoRA, AdaLoRA and DoRA layers of `model` are computed by one function each, and single rows that
    are trained of its embeddings beside the frozen ones; afterwards the model is as it was. `norms` takes the place of
    `row_norms`."""
    layers = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    with (
        casts_of_steps() as casts,
        replace_forward(layers, lambda layer: _FusedLayer(layer, casts, RowNorms(norms))),
        replace_forward(token_layers(model), TokenRows),
    ):
        yield


def describe_unfused(model: Any) -> str | None:
    """How many of a model's adapted layers compute through PEFT's forward, and why; None where none does."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    reasons = Counter(reason for layer in layers if (reason := _unfused_reason(layer)))
    if not reasons:
        return None
    left = sum(reasons.values())
    why = ", ".join(f"{count} {reason}" if len(reasons) > 1 else reason for reason, count in reasons.most_common())
    return f"fused LoRA: {len(layers) - left:,} of {len(layers):,} layers; {left:,} through PEFT's forward ({why})"


def _unfused_reason(layer: Any) -> str | None:
    """What keeps a layer from being computed by one function; None where nothing does."""
    if type(layer) not in FUSED_LAYERS:
        return {"ParamWrapper": "experts"}.get(type(layer).__name__, type(layer).__name__.lower())
    names = _active(layer)
    variants = [layer.lora_variant[name] for name in names if name in layer.lora_variant]
    if variants and len(names) > 1:
        return "several adapters, one of them not plain LoRA"
    if variants and type(variants[0]) is not DoraLinearVariant:
        return type(variants[0]).__name__
    if any(getattr(layer.lora_B[name], "bias", None) is not None for name in names):
        return "bias"
    if variants and not _owns_backward(layer.base_layer):
        return f"DoRA on {type(layer.base_layer).__name__}"
    return None


def _active(layer: Any) -> list[str]:
    factors = layer.lora_A
    return [name for name in layer.active_adapters if name in factors]


def _owns_backward(base: Any) -> bool:
    """Whether a base is a frozen layer of a known kind, whose backward pass follows from its weight."""
    if type(base) not in OWN_BASES or any(parameter.requires_grad for parameter in base.parameters()):
        return False
    if isinstance(base, Linear4bit) and getattr(base.weight, "quant_state", None) is None:
        return False
    return not isinstance(base, Linear8bitLt) or base.weight.dtype == torch.int8


class _FusedLayer:
    """The forward of one layer within `fused_lora`. What does not change while the adapters do not is looked up once:
    Python's own time is what a GPU waits for where a micro-batch is small."""

    def __init__(self, layer: Any, casts: Casts, norms: RowNorms) -> None:
        self.layer, self.peft_forward, self.casts, self.norms = layer, layer.forward, casts, norms
        self.base = layer.base_layer
        self.owns_backward = _owns_backward(self.base)
        self.is_int8 = isinstance(self.base, Linear8bitLt)
        self.reasons: dict[tuple[str, ...], str | None] = {}  # why adapters are left to PEFT's forward, by their names

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Any:
        layer = self.layer
        adapts = not (args or named or layer.disable_adapters or layer.merged)
        names = tuple(_active(layer)) if adapts else ()
        if names not in self.reasons:
            self.reasons[names] = _unfused_reason(layer)
        if not names or self.reasons[names]:
            return self.peft_forward(x, *args, **named)
        kind = x.device.type
        casting = torch.is_autocast_enabled(kind)
        pairs = [_factors(layer, name) for name in names]
        dtype = torch.get_autocast_dtype(kind) if casting else pairs[0][1].dtype
        # bitsandbytes' int8 layers multiply in the format of what comes in, autocast or not.
        base_dtype = dtype if casting and not self.is_int8 else x.dtype
        dropouts = tuple(_dropout(layer.lora_dropout[name]) for name in names)
        scalings = tuple(_scaling(layer, name, self.casts) for name in names)
        if names[0] in layer.lora_variant:
            products = DoraProducts(self.base, dtype, base_dtype, scalings[0], dropouts[0], self.casts, self.norms)
            return dora(products, x, *pairs[0], layer.lora_magnitude_vector[names[0]].weight)
        # A base with hooks gathers its weight around its own passes (DeepSpeed).
        own = self.owns_backward and not (self.base._forward_hooks or self.base._forward_pre_hooks)
        plain = LoraProducts(self.base if own else None, dtype, base_dtype, scalings, dropouts, self.casts)
        return lora(plain, x, None if own else self.base(x), [factor for pair in pairs for factor in pair])


def _dropout(dropout: Any) -> float:
    return float(dropout.p) if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of one adapter; of AdaLoRA's layers E A is the first."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    return (a * layer.lora_E[name], b) if isinstance(layer, AdaLoraLayer) else (a.weight, b.weight)


def _scaling(layer: Any, name: str, casts: Casts) -> float:
    if isinstance(layer, AdaLoraLayer):  # peft/tuners/adalora/layer.py
        return float(layer.scaling[name]) / (casts.of_number(layer.ranknum[name]) + 1e-5)
    return float(layer.scaling[name])


def release_int8_inputs(model: Any) -> Any:
    """Within this, the int8 layers of `model` release their inputs, to the same gradients: bitsandbytes keeps them on
    the node itself, which gradient checkpointing does not reach. Only a gradient of the frozen weight would need them.
    """
    layers = [module for module in model.modules() if type(module) is Linear8bitLt]
    return replace_forward(layers, lambda layer: partial(_forward_and_release, layer.forward))


def _forward_and_release(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    output = forward(x)
    # What bitsandbytes' products keep for the gradient of the weight, by their node (its autograd/_functions.py).
    name = {"MatMul8bitLtBackward": "tensors", "MatMul8bitFpBackward": "A"}.get(type(output.grad_fn).__name__)
    if name and not output.grad_fn.needs_input_grad[1]:
        setattr(output.grad_fn, name, (None, None, None) if name == "tensors" else None)
    return output
