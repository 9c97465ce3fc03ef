"""How the rows of a step are cut into micro-batches: by tokens, so that short rows fill the room that long ones need.
The planner counts micro-batches by the same function as training cuts them."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache


def cut_micro_batches(lengths: Sequence[int], budget: int, end_to_end: bool = False) -> list[slice]:
    """The micro-batches of rows or packs of so many tokens each, longest first: the fewest that take at most `budget`
    tokens each, padding included, and of these the most even. What is longer than the budget goes alone. `end_to_end`:
    packs are laid one behind the other, without padding."""
    return list(_cut_evenly(tuple(lengths), budget, end_to_end))


@lru_cache(maxsize=1024)  # a plan counts the same steps for every change that it considers
def _cut_evenly(lengths: tuple[int, ...], budget: int, end_to_end: bool) -> tuple[slice, ...]:
    fewest = fill_micro_batches(lengths, budget, end_to_end)
    if len(fewest) < 2:
        return tuple(fewest)
    smallest = bisect_left(
        range(1, budget + 1), -len(fewest), key=lambda size: -len(fill_micro_batches(lengths, size, end_to_end))
    )
    return tuple(fill_micro_batches(lengths, smallest + 1, end_to_end))


def fill_micro_batches(lengths: Sequence[int], budget: int, end_to_end: bool = False) -> list[slice]:
    """The same, each as full as it can be."""
    slices, first, longest, total = list[slice](), 0, 0, 0
    for at, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        need = total if end_to_end else longest * (at + 1 - first)
        if need > budget and at > first:
            slices.append(slice(first, at))
            first, longest, total = at, length, length
    return [*slices, slice(first, len(lengths))] if lengths else []


def padded_tokens(lengths: Sequence[int], end_to_end: bool = False) -> int:
    """The tokens that one micro-batch of such rows or packs takes, padding included."""
    return sum(lengths) if end_to_end else max(lengths, default=0) * len(lengths)
