"""The processor and the memory: what there is, what this process may use, and how fast it is."""

import os
from collections.abc import Iterator

from lorakit.data.worker_pool import processors
from lorakit.doctor.finding import CheckResult, gib
from lorakit.doctor.packages import import_error
from lorakit.doctor.speed import product_speed
from lorakit.hardware.cgroups import read_cgroup_limits
from lorakit.hardware.machine import processor

_FORMATS = ("float32", "bfloat16")  # a run on a processor takes no float16
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Below this a float32 model of a billion parameters does not load.
_LITTLE_MEMORY = 4 << 30


def cores() -> Iterator[CheckResult]:
    """The processor, and how much of it this process may use."""
    machine, usable, there, limits = processor(), processors(), os.cpu_count() or 1, read_cgroup_limits()
    said = f"{machine.name}, {usable} of {there} cores usable" if usable < there else f"{machine.name}, {there} cores"
    figures: dict[str, float] = {"cores": there, "usable": usable}
    if limits.processors is not None:
        said += f", limited to the time of {limits.processors:g} by the container or batch system"
        figures["limit"] = limits.processors
    yield CheckResult("processor", "ok", said, figures=figures)


def threads() -> Iterator[CheckResult]:
    """The threads in which torch computes, against the cores it may use."""
    if import_error("torch"):
        yield CheckResult("threads", "note", "not known, since torch cannot be imported")
        return
    import torch

    used, usable = (
        torch.get_num_threads(),
        int(max(1, min(processors(), read_cgroup_limits().processors or processors()))),
    )
    said, figures = f"torch computes in {used} threads", {"threads": used}
    limiting = next((name for name in _THREAD_VARIABLES if os.environ.get(name)), None)
    if used < usable and limiting:
        # Launchers such as torchrun and accelerate set OMP_NUM_THREADS=1 by themselves.
        said += f", {usable} could be used: {limiting} is {os.environ[limiting]}"
        yield CheckResult("threads", "note", said, f"unset {limiting}, unless other runs share this machine", figures)
    elif used > usable:
        said += f" on {usable} cores, which wait for each other"
        yield CheckResult("threads", "note", said, f"export OMP_NUM_THREADS={usable}", figures)
    else:
        yield CheckResult("threads", "ok", said, figures=figures)


def speeds() -> Iterator[CheckResult]:
    """The speed of a matrix product in each number format."""
    if import_error("torch"):
        yield CheckResult("speed", "note", "not measured, since torch cannot be imported")
        return
    plain = product_speed("cpu", "float32")[0]
    for dtype in _FORMATS:
        speed, size = product_speed("cpu", dtype)
        said = f"{speed / 1e9:,.1f} GFLOP/s, measured on {size} x {size}"
        if dtype != "float32":
            said += f", {speed / plain:.2g} times float32"
        yield CheckResult(dtype, "ok", said, figures={"speed": speed})


def memory() -> Iterator[CheckResult]:
    """Main memory: all, available, and the limit of a container or batch system."""
    limits, available = read_cgroup_limits(), processor().memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    figures = {"total": total, "available": available}
    said = f"{gib(available)} of {gib(total)} are available"
    if limits.memory is not None and limits.memory < total:
        left = min(available, limits.memory_left or 0)
        figures |= {"limit": limits.memory, "left": left}
        said += f"; the container or batch system gives {gib(limits.memory)}, of which {gib(left)} are left"
        available = left
    if available < _LITTLE_MEMORY:
        remedy = "close other programs: a model of 1B parameters alone takes 4 GB in float32"
        yield CheckResult("memory", "note", said, remedy, figures)
    else:
        yield CheckResult("memory", "ok", said, figures=figures)
