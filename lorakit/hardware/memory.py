"""Memory: telling that it ran out, giving it back, and measuring the most that a piece of work takes."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from lorakit.errors import first_line
from lorakit.hardware.accelerator import current_accelerator
from lorakit.hardware.machine import proc_value

Result = TypeVar("Result")

# What says so in words only: c10/core/impl/alloc_cpu.cpp; the libraries of CUDA and ROCm when they ask for memory of
# their own; Metal's allocator, and its limit of one buffer (transformers' modeling_utils.py); Intel's runtime
# (pytorch/pytorch#177714).
_OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUDA driver error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "HIP error: out of memory"),
    *("HIPBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory", "Invalid buffer size:"),
    *("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "UR_RESULT_ERROR_OUT_OF_RESOURCES"),
)

# Of malloc.h, and what gives memory back: glibc's defaults (its malloc.c), of the threshold the highest to which it
# raises that by itself.
_MMAP_THRESHOLD, _MMAP_MAX, _TRIM_THRESHOLD = -3, -4, -1
_GIVING_BACK = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 1 << 26}
_keeping: list[bool] = []
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # starts the peak of resident memory anew (the kernel's Documentation/filesystems/proc)


def return_freed_memory() -> None:
    """Let glibc return freed tensors to the system at once, from a MB on. Otherwise it keeps those of up to 32 MB
    scattered, and before 2.38 an aligned block hardly ever fits where another one was. Returning costs some time: a
    page is filled with zeros when it is allocated again. It takes effect within `keep_freed_memory` too."""
    for name, value in (_GIVING_BACK | {_MMAP_THRESHOLD: 1 << 20}).items():
        _call_glibc("mallopt", name, value)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Within this glibc keeps the memory of freed tensors for the next ones. Otherwise it maps large ones anew, and the
    system fills each of their pages with zeros: a tenth of a step's time on a processor. Within another one it changes
    nothing."""
    if _keeping:
        yield
        return
    _keeping.append(True)
    _call_glibc("mallopt", _MMAP_MAX, 0)
    _call_glibc("mallopt", _TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _keeping.clear()
        for name, value in _GIVING_BACK.items():
            _call_glibc("mallopt", name, value)
        _call_glibc("malloc_trim", 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out, with the allocator's message."""

    message: str


def within_memory(work: Callable[[], Result]) -> Result | OutOfMemory:
    """What `work` returns, or that memory ran out. The error, whose traceback holds the tensors of the failed work, is
    gone when this returns: drop what else belongs to it, then call `free_memory`."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(first_line(error))


def free_memory() -> None:
    """Free tensors in reference cycles, torch's spare blocks on a GPU, and the pages that glibc keeps."""
    gc.collect()
    _call_glibc("malloc_trim", 0)
    if current_accelerator():
        torch.accelerator.empty_cache()


@dataclass
class PeakMemory:
    """Memory in bytes: on a GPU what torch's tensors take, on a CPU what the process has resident."""

    before: int
    peak: int = 0
    reserved: int = 0  # with what torch keeps on a GPU between tensors, which no other process can use
    exact: bool = True  # False where the system tells only the whole process's peak so far: `peak` is an upper bound


@contextmanager
def measure_peak(device: torch.device) -> Iterator[PeakMemory]:
    """Measures the most memory that is used on `device` within; what it yields is filled in at the end. On a GPU this
    resets torch's own peaks (`max_memory_allocated`, `max_memory_reserved`)."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        memory = PeakMemory(torch.accelerator.memory_allocated(device))
    else:
        _call_glibc("malloc_trim", 0)  # what the C library keeps of freed memory would count as used before the work
        memory = PeakMemory(_resident("VmRSS") or process_peak())
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
            memory.exact = _resident("VmHWM") > 0
        except OSError:  # the system has no way to reset the peak, or does not let us
            memory.exact = False
    try:
        yield memory
    finally:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
            memory.peak = torch.accelerator.max_memory_allocated(device)
            memory.reserved = torch.accelerator.max_memory_reserved(device)
        else:
            memory.peak = memory.reserved = _resident("VmHWM") if memory.exact else process_peak()


def _call_glibc(function: str, *arguments: int) -> None:
    """Call one of glibc's own functions; on other systems nothing happens."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), function):
        getattr(library, function)(*arguments)


def run_peak(device: torch.device) -> int:
    """The most that a run took, in bytes: of torch's tensors on a GPU since `measure_peak`, or else of the process."""
    return torch.accelerator.max_memory_allocated(device) if device.type != "cpu" else process_peak()


def process_peak() -> int:
    """The most resident memory of this process since it began, or since its peak was reset."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident(name: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where it is not there."""
    return int(proc_value("self/status", name).partition(" ")[0] or 0) << 10
