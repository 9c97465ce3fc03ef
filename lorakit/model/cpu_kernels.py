"""Kernels of a processor, in float32: a model's own operations in fewer passes over memory and with less kept.

A pass over a large tensor costs its reading and writing, and for each new one the system's filling it with zeros. So
results are written over what nobody reads again. docs/benchmarks.md has what each is worth."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorakit.hardware.machine import proc_value
from lorakit.model.kernels import Kernels

# The numbers of rows of x at which MKL computes (W x^T)^T fast; others are padded to the next one (docs/benchmarks.md).
_ROW_COUNTS = (2, 4, 5, 6, 8, 16, 20, 24, 32, 36, 40, 48, 52, 56, 64)
# So many queries attend together to the keys up to the last of them.
_QUERIES = 256


def cpu_kernels() -> Kernels:
    """Those of a processor. They compute in float32, outside of autocast."""
    return Kernels(rms_norm, rotary, swiglu)


def rms_norm(x: Tensor, scale: Tensor, epsilon: float, offset: float, rounds_last: bool) -> Tensor:
    """x (..., width) over its root mean square, times `scale + offset` (width)."""
    result: Tensor = _RmsNorm.apply(x, scale + offset if offset else scale, epsilon)
    return result


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (rows, heads, tokens, size) rotated by halves; cosines and sines are (rows or 1, tokens, size
    rotated): what is beyond that stays."""
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (..., width)."""
    result: Tensor = _SwiGlu.apply(gate, up)
    return result


def few_rows_layers(model: Any) -> list[nn.Linear]:
    """The linear layers of a model that `few_rows_linear` computes faster: those in float32, where torch multiplies by
    MKL and the processor is not of Intel, whose library that is. Layers with a forward of their own are left to it."""
    if proc_value("cpuinfo", "vendor_id") in ("", "GenuineIntel") or not torch.backends.mkl.is_available():
        return []
    layers = (module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module))
    return [layer for layer in layers if layer.weight.dtype == torch.float32]


def few_rows_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output for x (..., in): (..., out). Of few rows it is (W x^T)^T, with rows of zeros added up to a
    number that MKL is fast at."""
    rows = x.shape[:-1].numel()
    if not 0 < rows <= _ROW_COUNTS[-1]:
        return linear(x, layer.weight, layer.bias)
    added = _ROW_COUNTS[bisect_left(_ROW_COUNTS, rows)] - rows
    columns = pad(x.reshape(rows, -1), (0, 0, 0, added)).t() if added else x.reshape(rows, -1).t()
    result = layer.weight @ columns if layer.bias is None else torch.addmm(layer.bias[:, None], layer.weight, columns)
    # torch transposes matrices in one thread, and tensors of three dimensions in all.
    return result[:, :rows].t()[:, None].contiguous().view(*x.shape[:-1], -1)


@contextmanager
def blocks_of_queries() -> Iterator[None]:
    """Within this, models with sdpa attention compute long masked rows in blocks, without the keys that come after all
    queries of a block: torch leaves out what a mask hides only where there is no mask and no key before the first
    query."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_attend_by_blocks, own)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own


def _attend_by_blocks(
    own: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, which is `own`: (rows, heads, tokens, width) -> (rows, tokens, heads,
    width). What is not causal is left to it."""
    tokens, before = query.shape[2], key.shape[2] - query.shape[2]
    masks = _masks_of_blocks(attention_mask, tokens, before)
    if not masks or any(named.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        whole: tuple[Tensor, None] = own(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named
        )
        return whole
    parts = [
        scaled_dot_product_attention(
            queries,
            key[:, :, : mask.shape[-1]],
            value[:, :, : mask.shape[-1]],
            mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for queries, mask in zip(query.split(_QUERIES, dim=2), masks, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _masks_of_blocks(mask: Tensor | None, tokens: int, before: int) -> list[Tensor]:
    """The mask (rows, heads, queries, keys) of each block, up to its last query's own key; none where there is but one
    block, or a query attends to a key after it. `before`: how many keys come before the first query."""
    if mask is None or mask.dtype != torch.bool or tokens <= _QUERIES or mask.shape[2:] != (tokens, before + tokens):
        return []
    parts = mask.split(_QUERIES, dim=2)
    ends = [before + min(start + _QUERIES, tokens) for start in range(0, tokens, _QUERIES)]
    if any(part[..., end:].any() for part, end in zip(parts, ends, strict=True)):
        return []
    return [part[..., :end] for part, end in zip(parts, ends, strict=True)]


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + epsilon)^-1/2; its gradient is r (g w) - x r^3 mean(g w x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_weight = (gradient * x).mul_(inverse).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        scaled = gradient * weight
        along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse**3).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, along), of_weight, None


class _Rotation(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) of the two halves of each head, whose cosines and sines may differ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        low, high = sin[:, None].chunk(2, dim=-1)
        return _rotated(x, cos[:, None], low, high, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        low, high = sin[:, None].chunk(2, dim=-1)
        return _rotated(gradient, cos[:, None], high, low, sign=-1), None, None


def _rotated(x: Tensor, cos: Tensor, low: Tensor, high: Tensor, sign: int) -> Tensor:
    """The halves a and b of x (..., size): (a cos - sign b low, b cos + sign a high)."""
    size = cos.shape[-1]
    turned = x[..., :size]
    rotated = turned * cos
    (a, b), (first, second) = turned.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    first.addcmul_(b, low, value=-sign)
    second.addcmul_(a, high, value=sign)
    return rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), dim=-1)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up, of which the two inputs are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = gradient * up
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, silu(gate).mul_(gradient)
