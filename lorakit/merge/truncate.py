"""The best matrix of a small rank beside a large one, as the factors of an adapter."""

from dataclasses import dataclass

import torch

# Up to this side the exact directions take seconds, beyond it minutes.
_EXACT_SIDE = 2048
_OVERSAMPLED, _ITERATIONS = 16, 8


@dataclass(frozen=True)
class Truncated:
    """B (out, rank) and A (rank, in), whose product comes closest to a matrix."""

    b: torch.Tensor
    a: torch.Tensor
    kept: float
    """|B A|^2, Frobenius."""


def truncate_to_rank(matrix: torch.Tensor, rank: int, seed: int = 0) -> Truncated:
    """The largest singular directions of a matrix (out, in), half of each value in B and half in A.

    The directions of the shorter side are exact where it is at most 2048 or the rank a quarter of it and more: they are
    the eigenvectors of the matrix times its transpose, in float64. Else they come from a randomized range finder with
    power iterations (Halko et al., arXiv 0909.4061), which gives the same ones for the same seed. B A is the projection
    of the matrix on them either way, so |B A|^2 is the share of |matrix|^2 that is kept.
    """
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if turned else matrix
    side = len(wide)
    rank = min(rank, side)
    exact = side <= _EXACT_SIDE or rank >= side // 4
    basis = _directions(wide, rank) if exact else _likely_directions(wide, rank, seed)
    rest = basis.mT @ wide
    lengths = torch.linalg.vector_norm(rest, dim=1)
    half = lengths.sqrt().clamp_min(torch.finfo(rest.dtype).tiny)
    left, right = basis * half, rest / half[:, None]
    b, a = (right.mT, left.mT) if turned else (left, right)
    return Truncated(b.contiguous(), a.contiguous(), float(lengths.double().square().sum()))


def _directions(wide: torch.Tensor, rank: int) -> torch.Tensor:
    """The first left singular vectors (rows, rank), largest first."""
    precise = wide.double()
    return torch.linalg.eigh(precise @ precise.mT).eigenvectors[:, -rank:].flip(1).to(wide.dtype)


def _likely_directions(wide: torch.Tensor, rank: int, seed: int) -> torch.Tensor:
    """Nearly the same, in a time that grows with the rank instead of the side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.svd_lowrank(wide, rank + max(rank, _OVERSAMPLED), niter=_ITERATIONS)[0][:, :rank]
