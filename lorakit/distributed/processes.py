"""The processes of one training, and what they do together; alone, every function here does the plain thing.

Each process has one device and runs the same command. What leaves the machine or changes the run's folder is the first
one's: it writes, prints and decides, and the others are told. torch.distributed is the engine; a second group, on
gloo, carries what is not a gradient: it needs no memory of a GPU, and notices at once where a process ends.
"""

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from lorakit.errors import EXIT_FAILED, LorakitError, exit_code_of

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
# Gradients that are summed in one message: large enough for the link's full speed, small beside the model.
_BUCKET = 1 << 24
_LOST = (
    "lost the connection to another process of this command: it was killed, or its machine or the link to it is gone. "
    "Of a training every checkpoint that was written is complete; --resume goes on from the last one."
)


@dataclass(frozen=True)
class World:
    """The processes of one training, seen from one of them. `control`: the group for all but tensors of the device;
    `watch`: the `Watch` of this process; `has_parent`: whether lorakit started them, and passes signals on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine
    control: Any = None
    watch: Any = None
    has_parent: bool = False


_world = World()


def set_world(world: World) -> None:
    """Make this process one of several, or one alone again."""
    global _world
    _world = world


def rank() -> int:
    """The number of this process among all, from 0."""
    return _world.rank


def world_size() -> int:
    """How many processes there are: 1 without a launcher."""
    return _world.size


def local_size() -> int:
    """How many of the processes are on this machine."""
    return _world.local_size


def is_first() -> bool:
    """Whether this process is the one that writes, prints and decides."""
    return _world.rank == 0


def is_first_of_node() -> bool:
    """Whether this process is the one of its machine that prepares what all of them read."""
    return _world.local_rank == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process works without the others, which do not wait for it."""
    global _world
    before, _world = _world, World()
    try:
        yield
    finally:
        _world = before


def has_parent() -> bool:
    """Whether lorakit itself started this process beside others. A second SIGTERM may then be the one that the parent
    passed on, where a batch system signals all processes; to stop at once, the parent sends SIGINT."""
    return _world.has_parent


class FailedElsewhere(LorakitError):
    """Another process failed, and has said why: this one ends with the same exit code and says nothing."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ProcessLost(LorakitError):
    """Another process ended without a word: it was killed, or its machine or the link to it is gone."""


def gather(value: Result) -> list[Result]:
    """What every process has, by rank; plain values that can be pickled. ProcessLost where one of them has ended."""
    if _world.size == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _world.size
    _communicate(lambda: distributed.all_gather_object(values, value, group=_world.control))
    return values


def from_first(value: Result) -> Result:
    """What the first process has, for all. ProcessLost where one of them has ended."""
    if _world.size == 1:
        return value
    from torch import distributed

    values = [value if is_first() else None]
    _communicate(lambda: distributed.broadcast_object_list(values, src=0, group=_world.control))
    return values[0]  # type: ignore[return-value]


def together(work: Callable[[], Result]) -> Result:
    """What `work` returns, once it is done on every process. Where it fails on one it fails on all: with its own error
    on the process of the lowest rank that failed, and FailedElsewhere on the others. It must not communicate itself:
    a process that fails would leave the others waiting."""
    if _world.size == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        if _world.watch and _world.watch.failed:
            raise  # the others have been told, and are not on their way here
        error = caught
    if any_of(error is not None) == (False,):
        return result  # type: ignore[return-value]
    failures = gather(None if error is None else (str(error), _exit_code(error)))
    rank, failure = next((rank, failure) for rank, failure in enumerate(failures) if failure)
    if error is not None and rank == _world.rank:
        raise error
    raise FailedElsewhere(*failure) from error


def announced(work: Callable[[], Result]) -> Result:
    """What `work` returns, which communicates itself: where it fails on one process, the others may be waiting inside
    it for a message that never comes. Its error is raised here at once, and the watch of each other process ends that
    one some seconds later with the same exit code. Nothing may communicate after such an error."""
    try:
        return work()
    except (ProcessLost, FailedElsewhere):
        raise
    except Exception as error:
        if _is_loss(error):
            raise ProcessLost(_LOST) from error
        if _world.watch:
            _world.watch.announce(_exit_code(error))
        raise


def _is_loss(error: Exception) -> bool:
    """Whether a library's error says that the connection to another process is gone."""
    from torch import distributed

    if isinstance(error, distributed.DistNetworkError | distributed.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _exit_code(error: Exception) -> int:
    return exit_code_of(error) if isinstance(error, LorakitError) else EXIT_FAILED


def refuse(error: LorakitError) -> NoReturn:
    """Raise an error that all processes meet alike: the first one as it is, the others without a message."""
    if is_first():
        raise error
    raise FailedElsewhere(str(error), exit_code_of(error)) from error


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` returns on the first process, for all; it runs on no other. Fails on all where it fails."""
    result = together(lambda: work() if is_first() else None)
    return from_first(result)  # type: ignore[return-value]


def any_of(*facts: bool) -> tuple[bool, ...]:
    """Of each fact, whether it is so on any process: one small message for all of them."""
    if _world.size == 1:
        return facts
    import torch
    from torch import distributed

    flags = torch.tensor([int(fact) for fact in facts])
    _communicate(lambda: distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=_world.control))
    return tuple(map(bool, flags.tolist()))


def largest(number: int) -> int:
    """The largest of the numbers that the processes have."""
    if _world.size == 1:
        return number
    import torch
    from torch import distributed

    value = torch.tensor(number)
    _communicate(lambda: distributed.all_reduce(value, distributed.ReduceOp.MAX, group=_world.control))
    return int(value)


def sum_in_place(tensors: "Iterable[torch.Tensor]") -> int:
    """Add up tensors over all processes, each in place, and return the bytes that were sent for it. All processes have
    the same tensors in the same order; every process gets the same sums, bit for bit."""
    if _world.size == 1:
        return 0
    import torch
    from torch import distributed

    sent, bucket, numbers = 0, list[torch.Tensor](), 0

    def reduce() -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            _communicate(lambda: distributed.all_reduce(bucket[0]))
        else:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            _communicate(lambda: distributed.all_reduce(flat))
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        bucket.clear()

    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or numbers + tensor.numel() > _BUCKET):
            reduce()
            numbers = 0
        bucket.append(tensor)
        numbers += tensor.numel()
        sent += tensor.numel() * tensor.element_size()
    if bucket:
        reduce()
    return sent


def time_sum(numbers: int, like: "torch.Tensor") -> float:
    """Seconds in which `sum_in_place` adds up so many numbers of the type and on the device of `like`, by a trial."""
    import torch

    tensor = torch.zeros(min(numbers, _BUCKET), dtype=like.dtype, device=like.device)
    seconds = 0.0
    for _ in range(3):  # the first ones connect and warm up
        begin = time.perf_counter()
        sum_in_place([tensor])
        tensor.sum().item()  # a device has done it when the sum is here
        seconds = time.perf_counter() - begin
    return seconds * -(-numbers // _BUCKET)


def copy_from_first(tensors: "Iterable[torch.Tensor]") -> None:
    """Give every process the first one's numbers, in place."""
    if _world.size == 1:
        return
    from torch import distributed

    for tensor in tensors:
        whole = tensor.contiguous()
        _communicate(partial(distributed.broadcast, whole, src=0))
        if whole is not tensor:
            tensor.copy_(whole)


def _communicate(operation: Callable[[], Any]) -> None:
    try:
        operation()
    except (pickle.PicklingError, TypeError, ValueError):
        raise
    except RuntimeError as error:  # torch's DistBackendError is one; gloo raises a plain one
        raise ProcessLost(_LOST) from error
