"""The same function over many pieces of work, in several processes, with the results in order."""

import ctypes
import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from lorakit.errors import LorakitError

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_job: Callable[..., Any] | None = None


def map_in_order(
    job: Callable[..., Any], pieces: Iterable[tuple[Any, ...]], processes: int
) -> Generator[Any, None, None]:
    """`job(*piece)` of each piece, in their order; with one process, in this one. Pieces are asked for a few ahead. The
    first error of a piece, in their order, is raised here; a `LorakitError` where a process was killed."""
    if processes < 2:
        for piece in pieces:
            yield job(*piece)
        return
    # Where it can be had, fork: a new interpreter would spend seconds on importing the libraries again.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    pending: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(job,))
    try:
        for piece in pieces:
            pending.append(pool.submit(_do, piece))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        what = "a process that prepares the rows was killed: memory ran out, most likely"
        raise LorakitError(f"{what}. Close other programs, or give shorter rows.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(job: Callable[..., Any]) -> None:
    global _job
    _job = job
    if sys.platform == "linux":  # a parent that is killed cannot end us, and would leave us waiting for ever
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The libraries' objects stay, and rows make no cycles: looking for garbage would take a third of the time.
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the processors already
    for stop in (signal.SIGINT, signal.SIGHUP):  # they come to the parent too, which ends us
        signal.signal(stop, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _do(piece: tuple[Any, ...]) -> Any:
    assert _job is not None
    return _job(*piece)
