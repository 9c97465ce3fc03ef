"""Adapters' linear layers in fewer passes over memory than PEFT's, to the same result within rounding.

PEFT computes `base(x) + B(A(x)) * scaling`: two passes over the layer's output forward and one backward that a matrix
product does on its own when it accumulates. On a CPU these passes are a tenth of a training step.

DoRA (Liu et al., arXiv 2402.09353) gives each row of W + s B A a length m of its own: it is scaled by m / |W + s B A|.
PEFT builds B A and the sum, and takes the norm of it, in every forward. The norm of a row follows from far less:
|W|^2 + 2s <W, B A> + s^2 |B A|^2, where <W, B A> = B . (W A^T) and |B A|^2 = B (A A^T) B^T, row by row.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import bnb
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

FUSED_LAYERS = (Linear, bnb.Linear4bit, bnb.Linear8bitLt)

# Where a row's squared norm falls under this share of the weight's own, the terms cancel: it is taken from the sum.
_CANCELLED = 0.1


class _RowNorms:
    """The norms of the rows of one layer's W + s B A, kept while nothing that they come from has changed. The squared
    norms of W's rows stay as long as W does; all else until the next backward: a step may have several forwards, and an
    optimizer that goes past torch's version counts comes after a backward. `compute`: as `factored_norms`."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute
        self._squares: tuple[Any, Tensor] | None = None
        self._norms: tuple[Any, Tensor] | None = None

    def of(self, base: Any, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """The norms (out) for the base's weight (out, in) and the adapter's a (rank, in), b (out, rank)."""
        now = (*((tensor.data_ptr(), tensor._version) for tensor in (base.weight, a, b)), scaling)
        if self._norms and self._norms[0] == now:
            return self._norms[1]
        with torch.no_grad():
            if not self._squares or self._squares[0] != now[0]:
                self._squares = (now[0], torch.linalg.vector_norm(weight, dim=1).square_())
            norms = self._compute(weight, self._squares[1], a, b, scaling)
        self._norms = (now, norms)
        return norms

    def forget(self) -> None:
        self._norms = None


def factored_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The norms (out) of the rows of weight + scaling * b @ a. `squares` (out): the squared norms of the weight's."""
    low = (weight @ a.t()).addmm_(b, a @ a.t(), beta=2 * scaling, alpha=scaling**2)
    squared = low.mul_(b).sum(1).add_(squares)
    cancelled = squared < _CANCELLED * squares
    norms = squared.clamp_(min=0).sqrt_()
    if cancelled.any():
        norms[cancelled] = torch.addmm(weight[cancelled], b[cancelled], a, alpha=scaling).norm(dim=1)
    return norms


@contextmanager
def replace_forward(layers: list[Any], make: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Within this, the forward of each layer is what `make` gives for it; afterwards it is its own again."""
    for layer in layers:
        layer.forward = make(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def fused_lora(model: Any, row_norms: Callable[..., Tensor] = factored_norms) -> AbstractContextManager[None]:
    """Within this, the LoRA and DoRA layers of `model` accumulate in place; afterwards the model is as it was.
    `row_norms` takes the place of `factored_norms`."""
    layers = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    return replace_forward(layers, lambda layer: partial(_forward, layer, layer.forward, _RowNorms(row_norms)))


def release_int8_inputs(model: Any) -> AbstractContextManager[None]:
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


def _forward(
    layer: Any, peft_forward: Callable[..., Tensor], norms: _RowNorms, x: Tensor, *args: Any, **named: Any
) -> Any:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or named or not names or not _is_exact(layer, names, x):
        return peft_forward(x, *args, **named)
    flat = x.flatten(0, -2)
    if names[0] in layer.lora_variant:
        result = _dora_forward(layer, names[0], flat, norms)
    else:
        result = layer.base_layer(flat)
        for name in names:
            low = layer.lora_A[name](layer.lora_dropout[name](flat))
            result = result.addmm_(low, layer.lora_B[name].weight.t(), alpha=layer.scaling[name])
    return result.unflatten(0, x.shape[:-1])


def _is_exact(layer: Any, names: list[str], x: Tensor) -> bool:
    """Plain active adapters, or one that is DoRA, in one number format throughout, their B without a bias."""
    if layer.disable_adapters or layer.merged or torch.is_autocast_enabled(x.device.type):
        return False
    if any(name in layer.lora_variant for name in names) and (len(names) > 1 or not _has_dora(layer, names[0])):
        return False
    weights = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in names]
    if any(weight.dtype != x.dtype for weight in weights) or any(layer.lora_B[name].bias is not None for name in names):
        return False
    return _base_is_exact(layer.base_layer, x)


def _base_is_exact(base: Any, x: Tensor) -> bool:
    if type(base) in (torch.nn.Linear, Conv1D):
        return bool(base.weight.dtype == x.dtype)
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if type(base) is Linear4bit:
        return on_cpu and base.weight.quant_state.dtype == x.dtype and base.compute_dtype in (None, x.dtype)
    return type(base) is Linear8bitLt and on_cpu and base.weight.dtype == torch.int8


def _has_dora(layer: Any, name: str) -> bool:
    """Whether a layer's adapter is DoRA on a frozen base, in float32 or wider: in half precision the factored norm is
    too coarse where its terms are large against each other."""
    if name not in layer.lora_magnitude_vector:
        return False
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not DoraLinearLayer or magnitude.weight.dtype not in (torch.float32, torch.float64):
        return False
    return not any(parameter.requires_grad for parameter in layer.base_layer.parameters())


def _dora_forward(layer: Any, name: str, x: Tensor, norms: _RowNorms) -> Tensor:
    """What PEFT's layer gives for x (tokens, in) with its one active adapter: (tokens, out). With dropout it leaves the
    base's own result as it is, and drops from what DoRA adds to it."""
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    magnitude = layer.lora_magnitude_vector[name].weight
    weight = _weight(base)
    norm = norms.of(base, weight, a, b, scaling)
    if isinstance(base, Linear8bitLt) and not base.training:  # bitsandbytes then rounds x to 8 bits too
        scale, bias = magnitude / norm, 0 if base.bias is None else base.bias
        return torch.addmm((base(x) - bias) * scale + bias, x @ a.t(), (b * scale[:, None]).t(), alpha=scaling)
    drops = layer.training and not isinstance(dropout, torch.nn.Identity)
    result = base(x) if drops else None
    return _Dora.apply(dropout(x), a, b, magnitude, result, weight, norm, base, norms, scaling)


def _weight(base: Any) -> Tensor:
    """The frozen weight (out, in) of a linear layer, dequantized where it is quantized."""
    if isinstance(base, (Linear4bit, Linear8bitLt)):
        return dequantize_bnb_weight(base.weight, getattr(base, "state", None))
    return base.weight.t() if isinstance(base, Conv1D) else base.weight


class _Dora(torch.autograd.Function):
    """share * (W x) + m/norm * s B A x, added to `result` if there is one (share: m/norm - 1), else to the bias. The
    norm takes no gradient (section 4.3 of the paper). By hand this is two passes over (tokens, out) forward and three
    backward more than plain LoRA has; written out in torch, PEFT's way, it is a dozen."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, a, b, magnitude, result, weight, norm, base, norms, scaling = inputs
        scale = magnitude / norm
        share = scale if result is None else scale - 1
        onto = base.bias if result is None else result
        low = x @ a.t()
        straight = x @ weight.t()
        output = straight * share if onto is None else torch.addcmul(onto, straight, share)
        ctx.save_for_backward(x, a, b, scale, share, norm, low, straight)
        ctx.base, ctx.norms, ctx.scaling = base, norms, scaling
        return output.addmm_(low, (b * scale[:, None]).t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, a, b, scale, share, norm, low, straight = ctx.saved_tensors
        ctx.norms.forget()  # after the tensors: with gradient checkpointing, asking for them runs the forward again
        scaled_b = b * (scale * ctx.scaling)[:, None]
        outer = gradient.t() @ low  # (out, rank)
        to_low = gradient @ scaled_b
        # `straight` is nobody else's and is read here for the last time: its memory serves both products.
        to_magnitude = straight.mul_(gradient).sum(0).add_((outer * b).sum(1), alpha=ctx.scaling).div_(norm)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (torch.mul(gradient, share, out=straight) @ _weight(ctx.base)).addmm_(to_low, a)
        to_b = outer.mul_((scale * ctx.scaling)[:, None])
        to_result = gradient if ctx.needs_input_grad[4] else None
        return to_x, to_low.t() @ x, to_b, to_magnitude, to_result, None, None, None, None, None
