"""Processor, main memory and disk: what there is, what this process may use, and how fast it is."""

import functools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.amounts import gibibytes
from lorakit.atomic_io import cache_folder
from lorakit.data.worker_pool import processors
from lorakit.doctor.check import DoctorFinding, broken, note, ok
from lorakit.doctor.packages import import_error
from lorakit.hardware.machine import processor, read_cgroup_limits

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Below this a float32 model of a billion parameters does not load.
_LITTLE_MEMORY = 4 << 30
# An adapter's run takes megabytes; a merged model, or one from the hub, several of these.
_LITTLE_SPACE = 10 << 30
_WIDTHS = (128, 256, 512, 1024, 2048, 4096)
# A product that takes this many seconds hides the cost of the call; in a number format without instructions of its own
# a small one does already.
_LONG_ENOUGH = 0.02
_SECONDS = 0.2


def check_processor() -> Iterator[DoctorFinding]:
    """The processor, and how much of it this process may use."""
    usable, cores, limit = processors(), os.cpu_count() or 1, read_cgroup_limits().processors
    message = f"{processor().name}, " + (f"{usable} of {cores} cores usable" if usable < cores else f"{cores} cores")
    figures: dict[str, float] = {"cores": cores, "usable": usable}
    if limit is not None:
        message += f", limited to the time of {limit:g} by the container or batch system"
        figures["limit"] = limit
    yield ok("processor", message, **figures)


def check_threads() -> Iterator[DoctorFinding]:
    """The threads that torch computes in, against the cores that it may use."""
    if import_error("torch"):
        yield note("threads", "not known, since torch cannot be imported")
        return
    import torch

    used, limit = torch.get_num_threads(), read_cgroup_limits().processors
    usable = int(max(1, min(processors(), limit or processors())))
    message = f"torch computes in {used} threads"
    variable = next((name for name in _THREAD_VARIABLES if os.environ.get(name)), None)
    if used < usable and variable:
        # Launchers such as torchrun and accelerate set OMP_NUM_THREADS=1 by themselves.
        message += f", {usable} could be used: {variable} is {os.environ[variable]}"
        yield note("threads", message, f"unset {variable}, unless other runs share this machine", threads=used)
    elif used > usable:
        message += f" on {usable} cores, which wait for each other"
        yield note("threads", message, f"export OMP_NUM_THREADS={usable}", threads=used)
    else:
        yield ok("threads", message, threads=used)


def check_speed() -> Iterator[DoctorFinding]:
    """The speed of a matrix product in the number formats that runs on a processor use."""
    if import_error("torch"):
        yield note("speed", "not measured, since torch cannot be imported")
        return
    for dtype in ("float32", "bfloat16"):
        speed, width = matmul_speed("cpu", dtype)
        message = f"{speed / 1e9:,.1f} GFLOP/s, measured on {width} x {width}"
        if dtype != "float32":
            message += f", {speed / matmul_speed('cpu', 'float32')[0]:.2g} times float32"
        yield ok(dtype, message, speed=speed)


def check_memory() -> Iterator[DoctorFinding]:
    """Main memory: all, available, and the limit of a container or batch system."""
    limits, available = read_cgroup_limits(), processor().memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    figures = {"total": total, "available": available}
    message = f"{gibibytes(available)} of {gibibytes(total)} are available"
    if limits.memory is not None and limits.memory < total:
        available = min(available, limits.memory_left or 0)
        figures |= {"limit": limits.memory, "left": available}
        message += f"; the container or batch system allows {gibibytes(limits.memory)}, {gibibytes(available)} left"
    if available < _LITTLE_MEMORY:
        remedy = "close other programs: a model of 1B parameters alone takes 4 GB in float32"
        yield note("memory", message, remedy, **figures)
    else:
        yield ok("memory", message, **figures)


def check_disk(run: Path | None) -> Iterator[DoctorFinding]:
    """The folders that commands write into: free space, size, and whether they can be written.

    `run` is a recipe's run folder; without a recipe, runs may go elsewhere than the current folder, which then only
    gets a note.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path.cwd() if run is None else run.absolute()
    yield _check_folder("runs", folder, "set another output.dir, or pass --output", needed=run is not None)
    remedy = "set LORAKIT_CACHE to another folder"
    yield _check_folder("lorakit's cache", cache_folder(), remedy, needed=True, with_size=True)
    remedy = "set HF_HUB_CACHE to another folder"
    yield _check_folder("hub's cache", Path(HF_HUB_CACHE), remedy, needed=False, with_size=True)


def _check_folder(name: str, folder: Path, remedy: str, needed: bool, with_size: bool = False) -> DoctorFinding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    figures = {"free": shutil.disk_usage(existing).free}
    message = f"{folder}: {gibibytes(figures['free'])} free"
    if with_size:
        files = (Path(parent, file) for parent, _, names in os.walk(folder) for file in names)
        figures["size"] = sum(file.lstat().st_size for file in files)  # a link is counted itself, not its file again
        message += f", {gibibytes(figures['size'])} in use" if folder.is_dir() else ", not created yet"
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        return (broken if needed else note)(name, f"{message}, cannot be written", remedy, **figures)
    if figures["free"] < _LITTLE_SPACE:
        return note(name, f"{message}, which is little", f"free some, or {remedy}", **figures)
    return ok(name, message, **figures)


@functools.cache
def matmul_speed(device: str, dtype: str) -> tuple[float, int]:
    """FLOP/s of a square matrix product, and its width.

    The width grows until a product takes 20 ms; that one is then repeated for 0.2 s, and the fastest counts.

    Raises:
        RuntimeError: the device cannot do it.
    """
    import torch

    for width in _WIDTHS:
        left, right = torch.rand(2, width, width).to(device, getattr(torch, dtype))
        _time_matmul(left, right, device)  # the first call pays for the setup
        seconds = _time_matmul(left, right, device)
        if seconds >= _LONG_ENOUGH:
            break
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        seconds = min(seconds, _time_matmul(left, right, device))
    return 2 * width**3 / seconds, width


def _time_matmul(left: Any, right: Any, device: str) -> float:
    import torch

    start = time.perf_counter()
    with torch.inference_mode():
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start
