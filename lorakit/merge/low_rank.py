"""Methods of combining the low-rank changes of several adapters, and the best change of a given rank.

What the methods compute is PEFT's (peft/utils/merge_utils.py, and `add_weighted_adapter` in peft/tuners/lora/model.py),
on the factors alone: no base is needed, the fused weights of experts are combined as well, and the result's scale is 1
for rsLoRA too, where PEFT's own result comes out sqrt(rank) times too strong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import merge_utils

from lorakit.model.low_rank import LowRankFactors, from_stacks

# Up to this side the exact directions take seconds, beyond it minutes.
_EXACT_SIDE = 2048
_OVERSAMPLED, _ITERATIONS = 16, 8

Combine = Callable[[Sequence[LowRankFactors], Sequence[float], float | None, int | None], LowRankFactors]
"""Takes the factors of each adapter that has the layer, their weights, the density and the rank asked for."""


def _concatenate(parts: Sequence[LowRankFactors], weights: Sequence[float], *_: Any) -> LowRankFactors:
    stacks = [part.stacks() for part in parts]
    scaled = [a * (weight * part.scale) for (a, _), weight, part in zip(stacks, weights, parts, strict=True)]
    return from_stacks(torch.cat(scaled, dim=1), torch.cat([b for _, b in stacks], dim=2))


def _approximate_sum(
    parts: Sequence[LowRankFactors], weights: Sequence[float], density: Any, rank: int | None
) -> LowRankFactors:
    """The sum's own rank is small, so its singular values are those of a small core between two orthonormal bases.
    `rank` is by default the largest of the parts'."""
    a, b = (stack.double() for stack in _concatenate(parts, weights).stacks())
    (left, upper), (right, lower) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    rank = min(rank or max(part.rank for part in parts), s.shape[-1])
    half = s[:, :rank].sqrt()
    a, b = half[:, :, None] * (vh[:, :rank] @ right.mT), left @ u[:, :, :rank] * half[:, None]
    return from_stacks(a.float(), b.float())


def _elementwise(merge: Callable[..., torch.Tensor]) -> Combine:
    """A method of PEFT's that combines all A and all B, each with the root of its adapter's weight and scale."""

    def combine(parts: Any, weights: Sequence[float], density: float | None, rank: Any) -> LowRankFactors:
        scaled = [weight * part.scale for weight, part in zip(weights, parts, strict=True)]
        roots = torch.tensor([math.sqrt(abs(value)) for value in scaled])
        signs = torch.tensor([math.copysign(1.0, value) for value in scaled])
        options = () if density is None else (density,)
        a = merge([part.a for part in parts], roots * signs, *options)
        b = merge([part.b for part in parts], roots, *options)
        return LowRankFactors(a, b, 1.0, parts[0].experts)

    return combine


@dataclass(frozen=True)
class CombineMethod:
    """One way of combining adapters."""

    function: Combine
    options: tuple[str, ...] = ()  # of density, seed and rank those that it takes
    equal_ranks: bool = True  # whether A and B are combined element by element, which requires equal ranks


# docs/merging.md says what each does.
METHODS = {
    "linear": CombineMethod(_elementwise(merge_utils.task_arithmetic)),
    "cat": CombineMethod(_concatenate, equal_ranks=False),
    "svd": CombineMethod(_approximate_sum, ("rank",), equal_ranks=False),
    "ties": CombineMethod(_elementwise(merge_utils.ties), ("density",)),
    "dare-linear": CombineMethod(_elementwise(merge_utils.dare_linear), ("density", "seed")),
    "dare-ties": CombineMethod(_elementwise(merge_utils.dare_ties), ("density", "seed")),
    "magnitude-prune": CombineMethod(_elementwise(merge_utils.magnitude_prune), ("density",)),
}


def truncate_to_rank(matrix: torch.Tensor, rank: int) -> LowRankFactors:
    """The largest singular directions of a matrix (out, in), half of each singular value in B and half in A.

    The directions of the shorter side are exact where it is at most 2048, or where the rank is at least a quarter of
    it: they are the eigenvectors of the matrix times its transpose, in float64. Otherwise they come from a randomized
    range finder with power iterations (Halko et al., arXiv 0909.4061). B A is the projection of the matrix on them
    either way, so |B A|^2 / |matrix|^2 is the share that is kept.
    """
    transposed = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if transposed else matrix
    side = len(wide)
    rank = min(rank, side)
    if side <= _EXACT_SIDE or rank >= side // 4:
        precise = wide.double()
        basis = torch.linalg.eigh(precise @ precise.mT).eigenvectors[:, -rank:].flip(1).to(wide.dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            basis = torch.svd_lowrank(wide, rank + max(rank, _OVERSAMPLED), niter=_ITERATIONS)[0][:, :rank]
    projected = basis.mT @ wide
    half = torch.linalg.vector_norm(projected, dim=1).sqrt().clamp_min(torch.finfo(projected.dtype).tiny)
    left, right = basis * half, projected / half[:, None]
    b, a = (right.mT, left.mT) if transposed else (left, right)
    return LowRankFactors(a.contiguous(), b.contiguous())
