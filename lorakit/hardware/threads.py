"""How many threads compute on a processor, and how they wait for each other.

torch's wheels for Linux compute in the threads of libgomp, GCC's OpenMP, which reads its environment once, when torch
loads it. By itself it starts a thread for each processor, whatever share of them a container allows; and a thread that
is done first turns in a loop, for up to 20 ms, before it lets go of its processor, though where other programs compute
too the thread that it waits for may have none.
"""

import os
import platform

from lorakit.hardware.cgroups import read_cgroup_limits

_COUNT, _WAITING = "OMP_NUM_THREADS", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Turns of that loop, with an x86 `pause` each, of 10 to 140 cycles (GCC's libgomp/config/linux/wait.h): on newer
# processors 0.07 ms, more than lies between most operations of a step, and far less than Linux gives another program
# at a time. Measured in docs/benchmarks.md.
_TURNS = "1000"

_written: dict[str, str] = {}  # what `set_up_threads` put into the environment


def set_up_threads() -> None:
    """Put what libgomp reads into the environment, to be called before torch is loaded. What is set there stays."""
    if platform.machine() == "x86_64" and not any(map(os.environ.get, _WAITING)):
        _written["GOMP_SPINCOUNT"] = _TURNS
    if not os.environ.get(_COUNT) and usable_processors() < _processors():
        _written[_COUNT] = str(usable_processors())
    os.environ.update(_written)


def share_threads(processes: int) -> None:
    """Have each of several processes that this one starts compute in as many threads as its part of the processors,
    unless the user said in how many."""
    if _COUNT in _written or not os.environ.get(_COUNT):
        os.environ[_COUNT] = str(max(usable_processors() // processes, 1))


def describe_threads() -> str:
    """A sentence on how many threads compute, where that was chosen here; else nothing."""
    if _COUNT not in _written:
        return ""
    allowed = f"{read_cgroup_limits().processors:.3g} of {_processors()} processors"
    return f"threads: {_written[_COUNT]}, since the container or batch system allows {allowed}"


def usable_processors() -> int:
    """The processors that this process may use, within the limit of a container or batch system."""
    return max(1, int(min(_processors(), read_cgroup_limits().processors or _processors())))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
