"""RMSNorm on a processor in fewer passes over memory than the models' own: forward two instead of four, backward four
instead of eight (measured 2 times as fast). A norm is replaced where it computes the same, which is tried on it."""

import copy
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.model.fused_lora import replace_forward

# How far two ways to one number may differ in float32, as a share and at least.
_ROUNDING = (1e-5, 1e-5)


def fused_norms(model: Any) -> AbstractContextManager[None]:
    """Within this, the frozen RMS norms of `model` take fewer passes over float32 on a processor; afterwards the model
    is as it was. Those whose weight is trained, and other devices and types, keep their own forward."""
    shifts: dict[type, float | None] = {}
    layers = []
    for module in model.modules():
        if _looks_like_rms_norm(module):
            if type(module) not in shifts:
                shifts[type(module)] = _shift(module)
            if shifts[type(module)] is not None:
                layers.append(module)
    return replace_forward(layers, lambda norm: partial(_forward, norm, norm.forward, shifts[type(norm)]))


def _looks_like_rms_norm(module: Any) -> bool:
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    is_frozen = weight is not None and weight.dim() == 1 and weight.is_floating_point() and not weight.requires_grad
    return is_frozen and len(parameters) == 1 and _epsilon(module) is not None and weight.device.type == "cpu"


def _epsilon(norm: Any) -> float | None:
    """What transformers' norms add to the mean square: families call it differently."""
    numbers = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((number for number in numbers if isinstance(number, float)), None)


def _shift(norm: Any) -> float | None:
    """What is added to a norm's weight before it scales, 0 or 1 as in Gemma; None where it computes something else."""
    if norm.weight.dtype != torch.float32:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, len(norm.weight)), generator=generator)
    tried = copy.deepcopy(norm)
    with torch.no_grad():
        tried.weight.copy_(torch.randn(len(norm.weight), generator=generator))
        try:
            expected = tried(x)
        except (TypeError, ValueError, RuntimeError):  # it is called with more than the states, or with other shapes
            return None
        for shift in (0.0, 1.0):
            ours, _ = _normalize(x, tried.weight + shift, float(_epsilon(norm) or 0.0))
            if (
                isinstance(expected, Tensor)
                and expected.shape == x.shape
                and torch.allclose(ours, expected, *_ROUNDING)
            ):
                return shift
    return None


def _forward(norm: Any, own_forward: Any, shift: float, x: Tensor, *args: Any, **named: Any) -> Tensor:
    is_plain = not args and not named and x.device.type == "cpu" and x.dtype == norm.weight.dtype == torch.float32
    if not is_plain or norm.weight.requires_grad or torch.is_autocast_enabled("cpu"):
        return own_forward(x, *args, **named)
    weight = norm.weight + shift if shift else norm.weight
    return _RmsNorm.apply(x, weight, _epsilon(norm))


def _normalize(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x (..., width) over its root mean square, times the weight; and one over that root (..., 1)."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * inverse).mul_(weight), inverse


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + epsilon)^-1/2; its gradient is r (g w) - x r^3 mean(g w x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, inverse = _normalize(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        scaled = gradient * weight
        along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse**3).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, along), None, None
