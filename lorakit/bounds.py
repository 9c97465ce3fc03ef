"""Bounds of time and memory for what others wrote: chat templates, regular expressions, rows.

The time is this process's computing time, so a busy machine or a paused process changes nothing. Only the main thread
can be interrupted: in others, and where the system has no such timer, nothing is bounded.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REPEAT = 0.5  # seconds after which the interruption is repeated, where it was swallowed
_active = False


class TooLong(Exception):
    """It took more computing time than it may."""


class _Expired(BaseException):
    """The timer's; no `except Exception` on the way catches it."""


@contextmanager
def bounded(seconds: float, memory: int | None = None) -> Iterator[None]:
    """Let the body compute for so many seconds at most, and take so many bytes more than the process has.

    Within another bound, only the outer one holds. A single operation of the interpreter, such as a power of large
    numbers, is not interrupted. Raises TooLong, or MemoryError.
    """
    global _active
    if _active or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGVTALRM, _expire)
    _active = True
    try:
        with _bounded_memory(memory):
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _REPEAT)
            yield
    except _Expired:
        raise TooLong from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        _active = False


def _expire(*_: Any) -> None:
    raise _Expired


@contextmanager
def _bounded_memory(size: int | None) -> Iterator[None]:
    """Requests beyond `size` more bytes fail. Only Linux tells what a process has."""
    if size is None or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
