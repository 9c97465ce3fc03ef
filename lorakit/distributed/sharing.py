"""Work on rows that the processes share: each computes some, and all get what every one computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

from lorakit.distributed.processes import gather, on_first, rank, together

Item = TypeVar("Item")
Result = TypeVar("Result")


def deal(items: Sequence[Item], number: int, count: int) -> list[Item]:
    """The share of process `number` of `count`, of items that stand the most costly first: they are dealt out in turns
    there and back, so that the shares cost alike. Every item is in one share; fewer items leave some without any."""
    return [item for at, item in enumerate(items) if at % (2 * count) in (number, 2 * count - 1 - number)]


def own_share(costs: Sequence[float], takes_part: bool = True) -> list[int]:
    """The numbers of the items that this process computes, in their order, of shares that cost alike. `takes_part`:
    whether this process can compute items; one at least must."""
    workers = [number for number, able in enumerate(gather(takes_part)) if able]
    if not takes_part:
        return []
    order = sorted(range(len(costs)), key=lambda number: -costs[number])
    return sorted(deal(order, workers.index(rank()), len(workers)))


def share_out(
    costs: Sequence[float], compute: Callable[[list[int]], Sequence[Result]], takes_part: bool = True
) -> list[Result]:
    """The result of every item, on all processes: `compute` gets the numbers of this process's share, and returns their
    results. It must not communicate, and is not called without an item. Where it fails on one process, it fails on
    all. `takes_part` as in `own_share`."""
    share = own_share(costs, takes_part)
    own = together(lambda: dict(zip(share, compute(share), strict=True)) if share else {})
    results = {number: result for of_process in gather(own) for number, result in of_process.items()}
    return [results[number] for number in range(len(costs))]


@contextmanager
def opened_by_first(context: Callable[[], AbstractContextManager[Result]]) -> Iterator[Result]:
    """What a context gives on the first process, for all; it is entered on no other. It is left before any process goes
    on, and where leaving it fails, it fails on all."""
    with ExitStack() as stack:
        yield on_first(lambda: stack.enter_context(context()))
        together(stack.close)
