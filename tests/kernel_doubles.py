"""What Liger's kernels compute and keep for the backward pass, written out in torch, where no Triton runs."""

import torch
from torch.nn.functional import gelu, silu

from lorakit.model.kernels import Kernels


def rms_norm(x, scale, epsilon, offset, rounds_last):
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if rounds_last:
        return (normal * (offset + scale.float())).to(x.dtype)
    return (normal.to(x.dtype) * (offset + scale)).to(x.dtype)


def rotary(q, k, cos, sin):
    size = cos.shape[-1]

    def rotated(x):
        one, two = x[..., :size].chunk(2, dim=-1)
        turned = torch.cat((-two, one), dim=-1)
        whole = x[..., :size] * cos[:, None] + turned * sin[:, None]
        return (whole if size == x.shape[-1] else torch.cat((whole, x[..., size:]), dim=-1)).to(x.dtype)

    return rotated(q), rotated(k)


def swiglu(gate, up):
    return silu(gate.float()).to(up.dtype) * up


def geglu(gate, up):
    return gelu(gate.float(), approximate="tanh").to(up.dtype) * up


def keeping(function, tensors, more=lambda *_: ()):
    """The function, which keeps what Liger's `save_for_backward` is given: its first inputs, so many, and `more`."""

    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            ctx.save_for_backward(*given[:tensors], *more(*given))
            ctx.rest = given[tensors:]
            return function(*given)

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors[:tensors]]
                found = torch.autograd.grad(function(*inputs, *ctx.rest), inputs, gradient)
            return *found, *(None for _ in ctx.rest)

    return Keeping.apply


def _roots(x, *_):
    return (torch.rsqrt(x.float().pow(2).mean(-1)),)


DOUBLES = Kernels(keeping(rms_norm, 2, _roots), rotary, keeping(swiglu, 2), keeping(geglu, 2))
