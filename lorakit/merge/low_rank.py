"""Methods of combining adapters: the factors of one layer in several adapters -> those of one that stands for them.

What they compute is PEFT's (peft/utils/merge_utils.py, and `add_weighted_adapter` in peft/tuners/lora/model.py), on the
factors alone: no base is needed, the fused weights of experts are combined as well, and the result's scale is 1 for
rsLoRA too, where PEFT's own result comes out sqrt(rank) times too strong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import merge_utils


@dataclass(frozen=True)
class LowRankFactors:
    """A layer's change, scale * B A: A is (rank * experts, in), B is (out, rank * experts), both float32.

    Of a linear layer `experts` is 1. PEFT stacks the experts of a fused weight with A's rows ordered by expert first,
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


@dataclass(frozen=True)
class CombineMethod:
    """One way of combining."""

    function: Callable[[Sequence[LowRankFactors], Sequence[float], float | None, int | None], LowRankFactors]
    """The factors of each adapter that has the layer, their weights, the density, and the rank asked for."""
    summary: str
    takes_density: bool = False
    is_random: bool = False
    takes_rank: bool = False
    equal_ranks: bool = True
    """Whether A and B are combined number by number, which asks for equal ranks."""


def from_stacks(a: torch.Tensor, b: torch.Tensor) -> LowRankFactors:
    """Factors of scale 1 from A (experts, rank, in) and B (experts, out, rank)."""
    flat = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return LowRankFactors(a.reshape(-1, a.shape[-1]).contiguous(), flat.contiguous(), 1.0, len(a))


def concatenated(
    parts: Sequence[LowRankFactors], weights: Sequence[float], density: Any = None, rank: Any = None
) -> LowRankFactors:
    """The weighted sum of the changes, exactly: the factors stand side by side, so that the ranks add up."""
    stacks = [part.stacks() for part in parts]
    scaled = [a * (weight * part.scale) for (a, _), weight, part in zip(stacks, weights, parts, strict=True)]
    return from_stacks(torch.cat(scaled, dim=1), torch.cat([b for _, b in stacks], dim=2))


def _truncated(
    parts: Sequence[LowRankFactors], weights: Sequence[float], density: Any, rank: int | None
) -> LowRankFactors:
    """The best approximation of the weighted sum within a rank, which is the largest of the parts' where none is asked.

    The sum's own rank is small, so its singular values are those of a small core between two orthonormal bases.
    """
    a, b = (stack.double() for stack in concatenated(parts, weights).stacks())
    (left, upper), (right, lower) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    wanted = min(rank or max(part.rank for part in parts), s.shape[-1])
    half = s[:, :wanted].sqrt()
    factors = from_stacks(half[:, :, None] * (vh[:, :wanted] @ right.mT), left @ u[:, :, :wanted] * half[:, None])
    return LowRankFactors(factors.a.float(), factors.b.float(), 1.0, factors.experts)


def _by_number(
    merged: Callable[..., torch.Tensor],
) -> Callable[[Sequence[LowRankFactors], Sequence[float], float | None, int | None], LowRankFactors]:
    """A method of PEFT's that combines all A and all B, each with the root of its adapter's weight and scale."""

    def function(
        parts: Sequence[LowRankFactors], weights: Sequence[float], density: float | None, rank: Any
    ) -> LowRankFactors:
        scaled = [weight * part.scale for weight, part in zip(weights, parts, strict=True)]
        roots = torch.tensor([math.sqrt(abs(value)) for value in scaled])
        signs = torch.tensor([math.copysign(1.0, value) for value in scaled])
        more = () if density is None else (density,)
        a = merged([part.a for part in parts], roots * signs, *more)
        b = merged([part.b for part in parts], roots, *more)
        return LowRankFactors(a, b, 1.0, parts[0].experts)

    return function


METHODS = {
    "linear": CombineMethod(
        _by_number(merge_utils.task_arithmetic),
        "adds the A and the B of equal ranks apart, so that each adapter's B meets the others' A too",
    ),
    "cat": CombineMethod(concatenated, "the weighted sum exactly; the ranks add up", equal_ranks=False),
    "svd": CombineMethod(
        _truncated, "the best approximation of the weighted sum within a rank", equal_ranks=False, takes_rank=True
    ),
    "ties": CombineMethod(
        _by_number(merge_utils.ties),
        "keeps the largest numbers, elects a sign for each, and takes the mean of those that have it",
        takes_density=True,
    ),
    "dare-linear": CombineMethod(
        _by_number(merge_utils.dare_linear),
        "linear, after numbers dropped at random and the others scaled up",
        takes_density=True,
        is_random=True,
    ),
    "dare-ties": CombineMethod(
        _by_number(merge_utils.dare_ties),
        "ties, with numbers dropped at random instead of the smallest",
        takes_density=True,
        is_random=True,
    ),
    "magnitude-prune": CombineMethod(
        _by_number(merge_utils.magnitude_prune), "linear, after the smallest numbers are dropped", takes_density=True
    ),
}


def distance(found: LowRankFactors, parts: Sequence[LowRankFactors], weights: Sequence[float]) -> tuple[float, float]:
    """The squared Frobenius norms of the weighted sum of the parts, and of what `found` differs from it."""
    terms = [(weight * part.scale, *part.stacks()) for part, weight in zip(parts, weights, strict=True)]
    return _squared_norm(terms), _squared_norm([*terms, (-found.scale, *found.stacks())])


def _squared_norm(terms: list[tuple[float, torch.Tensor, torch.Tensor]]) -> float:
    """|sum of c B A|^2 of numbers c, A (experts, rank, in) and B (experts, out, rank), without making any B A.

    The inner product of B A and B' A' is that of B^T B' and A A'^T, number by number.
    """
    wide = [(factor, a.double(), b.double()) for factor, a, b in terms]
    inner = (c * d * float(((b.mT @ q) * (a @ p.mT)).sum()) for c, a, b in wide for d, p, q in wide)
    return max(0.0, sum(inner))
