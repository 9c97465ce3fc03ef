"""DoRA (Liu et al., arXiv 2402.09353) without building B A: each row of W + s B A gets a length m of its own, as it is
scaled by m / |W + s B A|.

PEFT builds B A and the sum, and takes the norm of it, in every forward pass. Here the norms are taken once a
micro-batch. In float32 on a processor they follow from far less: |W|^2 + 2s <W, B A> + s^2 |B A|^2, where <W, B A> =
B . (W A^T) and |B A|^2 = B (A A^T) B^T, row by row. Elsewhere a few rows of the sum at a time are built, in float32: W
has to be cast for the factored terms too, and to ask whether they cancel would be to wait for the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.model.lora_function import Casts, accumulate, as_rows, frozen_weight, identity

# Where a row's squared norm falls under this share of the weight's own, the terms cancel: it is taken from the sum.
_CANCELLED = 0.1
# Numbers of the sum that are built at a time.
BUILT_AT_ONCE = 1 << 22
_INT8_DEQUANTIZES_ON = ("cpu", "xpu")  # as `DEQUANTIZING_INT8` in model/load.py, which imports more


class RowNorms:
    """The norms of the rows of one layer's W + s B A, kept while nothing that they come from has changed. The squared
    norms of W's rows stay as long as W does; all else until the next backward: a step may have several forwards, and an
    optimizer that goes past torch's version counts comes after a backward. `compute`: as `row_norms`."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute
        self._squares: tuple[Any, Tensor] | None = None
        self._norms: tuple[Any, Tensor] | None = None

    def of(self, base: Any, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """The norms (out) for the base's weight (out, in) and the adapter's a (rank, in), b (out, rank)."""
        now = (*map(identity, (base.weight, a, b)), scaling)
        if self._norms and self._norms[0] == now:
            return self._norms[1]
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            wide = torch.promote_types(weight.dtype, torch.float32)
            if not self._squares or self._squares[0] != now[0]:
                self._squares = (now[0], torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_())
            norms = self._compute(weight, self._squares[1], a.to(wide), b.to(wide), scaling)
        self._norms = (now, norms)
        return norms

    def forget(self) -> None:
        self._norms = None


def row_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The norms (out) of the rows of weight + scaling * b @ a. `squares` (out): the squared norms of the weight's."""
    if weight.device.type == "cpu" and weight.dtype == a.dtype:
        return factored_norms(weight, squares, a, b, scaling)
    some = max(1, BUILT_AT_ONCE // weight.shape[1])
    parts = zip(weight.split(some), b.split(some), strict=True)
    return torch.cat([torch.addmm(part.to(a.dtype), of_part, a, alpha=scaling).norm(dim=1) for part, of_part in parts])


def factored_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """As `row_norms`, from the factors."""
    low = (weight @ a.t()).addmm_(b, a @ a.t(), beta=2 * scaling, alpha=scaling**2)
    squared = low.mul_(b).sum(1).add_(squares)
    cancelled = squared < _CANCELLED * squares
    norms = squared.clamp_(min=0).sqrt_()
    if cancelled.any():
        norms[cancelled] = torch.addmm(weight[cancelled], b[cancelled], a, alpha=scaling).norm(dim=1)
    return norms


class DoraProducts(NamedTuple):
    """How a layer computes, besides its tensors."""

    base: Any
    dtype: torch.dtype  # of the adapter's products
    base_dtype: torch.dtype  # of the base's, and of what the layer gives
    scaling: float
    dropout: float
    casts: Casts
    norms: RowNorms


def dora(products: DoraProducts, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """What PEFT's layer gives for x (..., in): (..., out). With dropout it leaves the base's own result as it is, and
    drops from what DoRA adds to it. Where bitsandbytes' int8 layers round x too, so do these (but for what is left of
    x, as PEFT's)."""
    result = products.base(x) if products.dropout else None
    return _Dora.apply(products, x, a, b, magnitude, result)


def _rounds_inputs(base: Any) -> bool:
    return isinstance(base, Linear8bitLt) and not (base.training and base.weight.device.type in _INT8_DEQUANTIZES_ON)


class _Dora(torch.autograd.Function):
    """share * (W x) + m/norm * s B A x, added to `result` if there is one (share: m/norm - 1), else to the bias. The
    norm takes no gradient (section 4.3 of the paper). By hand this is two passes over (tokens, out) forward and three
    backward more than plain LoRA has, and W x is kept; written out in torch, PEFT's way, it is a dozen."""

    @staticmethod
    def forward(ctx: Any, products: DoraProducts, x: Tensor, *tensors: Any) -> Tensor:
        a, b, magnitude, result = tensors
        base, dtype, base_dtype, casts = products.base, products.dtype, products.base_dtype, products.casts
        dropped, mask = seen, _ = casts.of_input(x, dtype), None
        if products.dropout:
            dropped, mask = torch.native_dropout(seen, products.dropout, True)
        weight = frozen_weight(base, base_dtype)
        if result is None and _rounds_inputs(base):
            straight = as_rows(base(x) if base.bias is None else base(x) - base.bias)
        else:
            straight = as_rows(dropped).to(base_dtype) @ weight.t()
        norm = products.norms.of(base, weight, a, b, products.scaling)
        scale = magnitude / norm
        share = scale if result is None else scale - 1
        low = as_rows(dropped) @ casts.of_factor(a, dtype).t()
        right = (b * (scale * products.scaling)[:, None]).to(dtype).t()
        onto = base.bias if result is None else as_rows(result)
        output = low @ right if onto is None else torch.addmm(onto.to(dtype), low, right)
        wanted = x.dtype if isinstance(base, Linear4bit) else straight.dtype
        wanted = wanted if result is None else result.dtype
        output = output.to(wanted).addcmul_(straight, share)  # last, as the largest part: it is rounded once
        ctx.save_for_backward(x if x.element_size() < seen.element_size() else seen, mask, straight)
        ctx.products, ctx.factors, ctx.vectors = products, (a, b), (scale, share, norm)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return torch.ops.aten._unsafe_view(output, (*x.shape[:-1], output.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        products, (a, b), (scale, share, norm) = ctx.products, ctx.factors, ctx.vectors
        dtype, base_dtype, scaling = products.dtype, products.base_dtype, products.scaling / (1 - products.dropout)
        saved, mask, straight = ctx.saved_tensors
        products.norms.forget()  # after the tensors: asking for them may run the forward pass again (checkpointing)
        rows, left = as_rows(gradient).to(dtype), as_rows(saved).to(dtype)
        left = left if mask is None else left * as_rows(mask)
        narrow = products.casts.of_factor(a, dtype)
        outer = (rows.t() @ (left @ narrow.t())).to(b.dtype)  # (out, rank)
        to_low = rows @ (b * scale[:, None]).to(dtype)
        # `straight` is nobody else's and is read here for the last time: its memory serves both products.
        product = straight.mul_(rows) if straight.dtype == gradient.dtype else straight * as_rows(gradient)
        to_magnitude = product.sum(0, dtype=norm.dtype).add_((outer * b).sum(1), alpha=scaling).div_(norm)
        to_x = None
        if ctx.needs_input_grad[1]:
            to_x = torch.mul(rows, share, out=straight).to(base_dtype) @ frozen_weight(products.base, base_dtype)
            to_x = to_x.to(ctx.dtype)
            accumulate(to_x, to_low, narrow, products.scaling)
            to_x = to_x if mask is None else to_x.mul_(as_rows(mask)).div_(1 - products.dropout)
            to_x = to_x.view(ctx.shape)
        to_a = (to_low.t() @ left).to(a.dtype).mul_(scaling)
        to_b = outer.mul_((scale * scaling)[:, None])
        return None, to_x, to_a, to_b, to_magnitude, gradient if ctx.needs_input_grad[5] else None
