"""Low-rank changes of one layer: methods of combining those of several adapters, and the best one of a given rank.

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

# Up to this side the exact directions take seconds, beyond it minutes.
_EXACT_SIDE = 2048
_OVERSAMPLED, _ITERATIONS = 16, 8


@dataclass(frozen=True)
class LowRankFactors:
    """A layer's change, scale * B A: A is (rank * experts, in), B is (out, rank * experts), both float32.

    `experts` is 1 for a linear layer. PEFT stacks the experts of a fused weight with A's rows ordered by expert first,
    and B's columns by rank first (ParamWrapper in peft/tuners/lora/layer.py).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    experts: int = 1

    @property
    def rank(self) -> int:
        return len(self.a) // self.experts

    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (experts, rank, in) and B as (experts, out, rank), without the scale."""
        b = self.b.reshape(len(self.b), -1, self.experts).permute(2, 0, 1)
        return self.a.reshape(self.experts, -1, self.a.shape[1]), b

    def squared_norm(self) -> float:
        """|scale * B A|^2, Frobenius."""
        return _squared_norm([(self, 1.0)])


def from_stacks(a: torch.Tensor, b: torch.Tensor) -> LowRankFactors:
    """Factors of scale 1 from A (experts, rank, in) and B (experts, out, rank)."""
    flat = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return LowRankFactors(a.reshape(-1, a.shape[-1]).contiguous(), flat.contiguous(), 1.0, len(a))


Combine = Callable[[Sequence[LowRankFactors], Sequence[float], float | None, int | None], LowRankFactors]
"""Takes the factors of each adapter that has the layer, their weights, the density and the rank asked for."""


def _concatenate(parts: Sequence[LowRankFactors], weights: Sequence[float], *_: Any) -> LowRankFactors:
    """The weighted sum of the changes, exactly: the factors are put side by side, so the ranks add up."""
    stacks = [part.stacks() for part in parts]
    scaled = [a * (weight * part.scale) for (a, _), weight, part in zip(stacks, weights, parts, strict=True)]
    return from_stacks(torch.cat(scaled, dim=1), torch.cat([b for _, b in stacks], dim=2))


def _approximate_sum(
    parts: Sequence[LowRankFactors], weights: Sequence[float], density: Any, rank: int | None
) -> LowRankFactors:
    """The best approximation of the weighted sum within a rank, by default the largest of the parts'. The sum's own
    rank is small, so its singular values are those of a small core between two orthonormal bases."""
    a, b = (stack.double() for stack in _concatenate(parts, weights).stacks())
    (left, upper), (right, lower) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    rank = min(rank or max(part.rank for part in parts), s.shape[-1])
    half = s[:, :rank].sqrt()
    a, b = half[:, :, None] * (vh[:, :rank] @ right.mT), left @ u[:, :, :rank] * half[:, None]
    return from_stacks(a.float(), b.float())


def _elementwise(merge: Callable[..., torch.Tensor]) -> Combine:
    """A method of PEFT's that combines all A and all B, each with the root of its adapter's weight and scale."""

    def combine(
        parts: Sequence[LowRankFactors], weights: Sequence[float], density: float | None, rank: Any
    ) -> LowRankFactors:
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
    summary: str
    takes_density: bool = False
    is_random: bool = False
    takes_rank: bool = False
    equal_ranks: bool = True
    """Whether A and B are combined element by element, which requires equal ranks."""


METHODS = {
    "linear": CombineMethod(
        _elementwise(merge_utils.task_arithmetic),
        "adds the A and the B of equal ranks apart, so that each adapter's B meets the others' A too",
    ),
    "cat": CombineMethod(_concatenate, "the weighted sum exactly; the ranks add up", equal_ranks=False),
    "svd": CombineMethod(
        _approximate_sum,
        "the best approximation of the weighted sum within a rank",
        equal_ranks=False,
        takes_rank=True,
    ),
    "ties": CombineMethod(
        _elementwise(merge_utils.ties),
        "keeps the largest numbers, elects a sign for each, and takes the mean of those that have it",
        takes_density=True,
    ),
    "dare-linear": CombineMethod(
        _elementwise(merge_utils.dare_linear),
        "linear, after numbers dropped at random and the others scaled up",
        takes_density=True,
        is_random=True,
    ),
    "dare-ties": CombineMethod(
        _elementwise(merge_utils.dare_ties),
        "ties, with numbers dropped at random instead of the smallest",
        takes_density=True,
        is_random=True,
    ),
    "magnitude-prune": CombineMethod(
        _elementwise(merge_utils.magnitude_prune),
        "linear, after the smallest numbers are dropped",
        takes_density=True,
    ),
}


def squared_distance(
    change: LowRankFactors, parts: Sequence[LowRankFactors], weights: Sequence[float]
) -> tuple[float, float]:
    """The squared Frobenius norms of the weighted sum of the parts, and of its difference from `change`."""
    terms = list(zip(parts, weights, strict=True))
    return _squared_norm(terms), _squared_norm([*terms, (change, -1.0)])


def _squared_norm(terms: Sequence[tuple[LowRankFactors, float]]) -> float:
    """|sum of weight * scale * B A|^2, without computing any B A: the inner product of B A and B' A' is the sum of B^T
    B' times A A'^T, element by element."""
    wide = []
    for factors, weight in terms:
        a, b = factors.stacks()
        wide.append((weight * factors.scale, a.double(), b.double()))
    inner = (c * d * float(((b.mT @ q) * (a @ p.mT)).sum()) for c, a, b in wide for d, p, q in wide)
    return max(0.0, sum(inner))


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
