"""Settings of single adapter kinds. The recipe's schema is built on them: no torch here."""

from typing import Annotated

from pydantic import Field

from lorakit.registry import Section

_Share = Annotated[float, Field(gt=0, lt=1)]
_NotNegative = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(gt=0)]


class Pissa(Section):
    """Settings of pissa."""

    iterations: _Count | None = 16
    """Rounds of the randomized singular value decomposition; null makes an exact one, which takes far longer."""


class Eva(Section):
    """Settings of eva."""

    rho: Annotated[float, Field(ge=1)] = 2.0
    """How many times `rank` a module may get; 1 leaves every module its rank."""
    converged: _Share = 0.99
    """How alike the directions found after two batches must be for the pass over the rows to end."""


class AdaLora(Section):
    """Settings of adalora. Its budget is `rank` for every module on average."""

    initial_rank: _Count | None = None
    """The rank that every module starts with; null is one and a half times `rank`."""
    shrink_from: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps after which directions begin to be taken away."""
    shrink_to: _Share = 0.7
    """The share of the steps after which the ranks stay as they are."""
    every: _Count = 5
    """Steps from one choice of directions to the next."""
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """The moving averages' share of the past: of a direction's importance, and of how sure that is."""
    orthogonality: _NotNegative = 0.5
    """The weight of the penalty that keeps directions apart."""


class FlexLora(Section):
    """Settings of flexlora. The sum of all ranks stays what it is."""

    move_from: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps after which ranks begin to move."""
    move_to: _Share = 0.7
    """The share of the steps after which the ranks stay as they are."""
    every: _Count = 5
    """Steps from one move to the next."""
    moved: _Count = 4
    """How many modules give a direction away at each move, and how many get one."""
    orthogonality: _NotNegative = 0.1
    """The weight of the penalty that keeps directions apart."""
