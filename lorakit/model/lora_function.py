"""The forward and backward pass of a linear layer with LoRA, by hand: `base(x) + scaling * B A x`.

Written out in torch, PEFT's way, autograd keeps what each product took and gave, and each factor of the adapter is cast
for each product. Here one function keeps x alone, computes A x again in the backward pass, and lets each product
accumulate into what is there already. A quantized weight is dequantized once in either pass.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

OWN_BASES = (torch.nn.Linear, Conv1D, Linear4bit, Linear8bitLt)
"""Frozen linear layers whose backward pass is computed here; any other computes its own."""


def identity(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor gets other numbers, by torch's own ways: its storage, or its version."""
    return tensor.untyped_storage()._cdata, tensor._version


class Casts:
    """Tensors in the number format of a product. A parameter is cast once a step: its cast stays while the parameter
    does, until an optimizer has stepped, which may go past torch's version counts. An input is cast once for all layers
    that share it."""

    def __init__(self) -> None:
        self._parameters: dict[Tensor, tuple[Any, Tensor]] = {}
        self._numbers: dict[Tensor, float] = {}
        self._input: tuple[Any, Any, Tensor] | None = None

    def of_factor(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """An adapter's factor; one that was computed for this pass, and is no parameter, is cast anew."""
        if factor.dtype == dtype:
            return factor
        if not isinstance(factor, torch.nn.Parameter):
            return factor.detach().to(dtype)
        now = *identity(factor), factor.shape, dtype
        known = self._parameters.get(factor)
        if known is None or known[0] != now:
            known = self._parameters[factor] = now, factor.detach().to(dtype)
        return known[1]

    def of_number(self, number: Tensor) -> float:
        """A number that stays what it is, read from the device once."""
        if number not in self._numbers:
            self._numbers[number] = float(number.detach())
        return self._numbers[number]

    def of_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if x.is_inference():
            return x.to(dtype)
        now = x._version, dtype
        if self._input is None or self._input[0]() is not x or self._input[1] != now:
            self._input = weakref.ref(x, self._drop_input), now, x.detach().to(dtype)
        return self._input[2]

    def _drop_input(self, gone: Any) -> None:
        if self._input is not None and self._input[0] is gone:
            self._input = None

    def forget(self) -> None:
        self._parameters.clear()


@contextmanager
def casts_of_steps() -> Iterator[Casts]:
    """Casts that are forgotten whenever an optimizer steps."""
    casts = Casts()
    hook = register_optimizer_step_post_hook(lambda *_: casts.forget())
    try:
        yield casts
    finally:
        hook.remove()


def frozen_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of one of OWN_BASES in the format of a product, dequantized where it is quantized."""
    if isinstance(base, Linear4bit):
        return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)
    if isinstance(base, Linear8bitLt):  # as bitsandbytes does it in its backward pass (autograd/_functions.py)
        scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
        return base.weight.data.to(dtype).mul_(scales.to(base.weight.device).unsqueeze(1).mul(1.0 / 127.0))
    return cast(base.weight.t() if isinstance(base, Conv1D) else base.weight, dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without a call where it is no change: thousands of small calls keep a GPU waiting."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def as_no_view(flat: Tensor, output: Tensor) -> Tensor:
    """A layer's output whose rows are `flat`; no view, since models change what a layer gives in place."""
    return output if output._base is None and flat._base is output else torch.ops.aten._unsafe_view(flat, output.shape)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., features) as (tokens, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale * left @ right`, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add `scale * left @ right` to `total`, in its own format."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


class LoraProducts(NamedTuple):
    """How a layer computes, besides its tensors. `base` is None where it has computed already, with a backward pass of
    its own."""

    base: Any
    dtype: torch.dtype  # of the adapter's products
    base_dtype: torch.dtype  # of the base's product in the backward pass
    scalings: tuple[float, ...]  # of each adapter
    dropouts: tuple[float, ...]
    casts: Casts


def lora(products: LoraProducts, x: Tensor, result: Tensor | None, factors: list[Tensor]) -> Tensor:
    """The layer's output for x (..., in): (..., out). `factors`: A (rank, in) and B (out, rank) of each adapter in
    turn; `result`: what the base gave, where it computes for itself."""
    return _Lora.apply(products, x, result, *factors)


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: LoraProducts, x: Tensor, result: Tensor | None, *factors: Tensor) -> Tensor:
        casts, dtype = products.casts, products.dtype
        seen, masks = casts.of_input(x, dtype), []
        output = products.base(x) if result is None else result.clone()
        flat = as_rows(output)
        for number, dropout in enumerate(products.dropouts):
            dropped, mask = torch.native_dropout(seen, dropout, True) if dropout else (seen, None)
            masks.append(mask)
            a, b = casts.of_factor(factors[2 * number], dtype), casts.of_factor(factors[2 * number + 1], dtype)
            accumulate(flat, as_rows(dropped) @ a.t(), b.t(), products.scalings[number])
        needed = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward((x if x.element_size() < seen.element_size() else seen) if needed else None, *masks)
        ctx.products, ctx.factors, ctx.shape, ctx.dtype = products, factors, x.shape, x.dtype
        return as_no_view(flat, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        products, needs = ctx.products, ctx.needs_input_grad
        saved, *masks = ctx.saved_tensors
        to_result, rows = gradient if needs[2] else None, as_rows(gradient)
        to_x, to_factors = None, []
        if needs[1] and products.base is not None:
            to_x = cast(rows, products.base_dtype) @ frozen_weight(products.base, products.base_dtype)
            to_x = cast(to_x, ctx.dtype)  # before more is added
        rows = cast(rows, products.dtype)
        seen = None if saved is None else cast(as_rows(saved), products.dtype)
        for number, mask in enumerate(masks):
            mask = None if mask is None else as_rows(mask)
            pair = slice(2 * number, 2 * number + 2)
            to_low, of_pair = _backward_of_factors(
                products, number, ctx.factors[pair], rows, seen, mask, needs[3:][pair]
            )
            to_factors += of_pair
            if needs[1]:
                to_x = _backward_of_input(products, number, ctx.factors[2 * number], to_low, mask, to_x)
        to_x = None if to_x is None else cast(to_x, ctx.dtype).view(ctx.shape)
        return None, to_x, to_result, *to_factors


def _scaling_of_the_rest(products: LoraProducts, number: int) -> float:
    """The scale of what dropout has left of an adapter's input."""
    return products.scalings[number] / (1 - products.dropouts[number] or 1.0)


def _backward_of_factors(
    products: LoraProducts,
    number: int,
    factors: tuple[Tensor, ...],
    rows: Tensor,
    seen: Tensor | None,
    mask: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of A x without its scale (tokens, rank), and those of A and B."""
    a, b = (products.casts.of_factor(factor, products.dtype) for factor in factors)
    to_low, scaling = rows @ b, _scaling_of_the_rest(products, number)
    if seen is None or not any(needs):
        return to_low, [None, None]
    left = seen if mask is None else seen * mask
    to_a = product(to_low.t(), left, scaling) if needs[0] else None
    to_b = product(rows.t(), left @ a.t(), scaling) if needs[1] else None
    return to_low, [to_a, to_b]  # autograd gives them their parameter's format


def _backward_of_input(
    products: LoraProducts, number: int, a: Tensor, to_low: Tensor, mask: Tensor | None, to_x: Tensor | None
) -> Tensor:
    """The gradient of x with what came through one adapter."""
    a, scaling = products.casts.of_factor(a, products.dtype), _scaling_of_the_rest(products, number)
    if mask is not None:
        through = product(to_low, a, scaling)
        return through.mul_(mask) if to_x is None else to_x.addcmul_(through, mask)
    if to_x is None:
        return product(to_low, a, scaling)
    accumulate(to_x, to_low, a, scaling)
    return to_x
