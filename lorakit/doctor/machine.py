"""Threads, speed, main memory and disk, and what this process may use of them; and what `auto` makes of it."""

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.amounts import gibibytes
from lorakit.atomic_io import cache_folder
from lorakit.data.worker_pool import processors
from lorakit.doctor.check import DoctorFinding, broken, import_error, note, ok, require_import, root_cause
from lorakit.errors import UserError
from lorakit.hardware.machine import processor, read_cgroup_limits, this_machine, usable_machine
from lorakit.progress import Silent

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe

# Below this a float32 model of a billion parameters does not load.
_LITTLE_MEMORY = 4 << 30
# An adapter's run takes megabytes; a merged model, or one from the hub, several of these.
_LITTLE_SPACE = 10 << 30
# Of what `auto` chooses; the rest depends on the model and the rows.
_BY_MACHINE = ("model.dtype", "model.attention", "data.packing", "train.optimizer")
# A product is not all of training: a smaller difference in it decides nothing.
_CLEARLY_FASTER = 1.3


def check_threads() -> Iterator[DoctorFinding]:
    """The threads that torch computes in, against the cores that it may use."""
    require_import("torch")
    import torch

    used, usable = torch.get_num_threads(), processors()
    usable = max(1, int(min(usable, read_cgroup_limits().processors or usable)))
    message = f"torch computes in {used} threads"
    variable = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None)
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
    require_import("torch")
    yield from measure_formats("cpu", "float32", "bfloat16")


def measure_formats(device: str, *dtypes: str) -> Iterator[DoctorFinding]:
    """The speed of a matrix product on a device in each number format, up to the first that fails."""
    for dtype in dtypes:
        try:
            speed, width = matmul_speed(device, dtype)
        except RuntimeError as error:
            remedy = "install a build of torch for this GPU's compute capability and driver"
            yield broken(dtype, f"a matrix product fails: {root_cause(error)}", remedy)
            return
        yield ok(dtype, f"{speed / 1e9:,.0f} GFLOP/s, measured on {width} x {width}", speed=speed)


def check_memory() -> Iterator[DoctorFinding]:
    """Main memory: all, what is available within the limit of a container or batch system, and that limit."""
    limit, available = read_cgroup_limits().memory, processor().memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    figures, message = (
        {"total": total, "available": available},
        f"{gibibytes(available)} of {gibibytes(total)} are free",
    )
    if limit is not None and limit < total:
        figures["limit"], message = limit, f"{message}; the container or batch system allows {gibibytes(limit)}"
    if available < _LITTLE_MEMORY:
        remedy = "close other programs: a model of 1B parameters alone takes 4 GB in float32"
        yield note("memory", message, remedy, **figures)
    else:
        yield ok("memory", message, **figures)


def check_choices(recipe: "Recipe | None") -> Iterator[DoctorFinding]:
    """What `auto` chooses here, with its reason; of the number format also whether the measured speed agrees.

    Without a recipe, what depends on the machine alone. A setting of the recipe that cannot work here is broken.
    """
    from lorakit.plan.auto import resolve_auto  # imported here, since a broken pydantic must not end the other checks
    from lorakit.plan.model_info import find_model_info
    from lorakit.recipe.schema import Data, Model, Recipe

    # The device that a run would use; the driver's answer where torch cannot be imported.
    machine = this_machine() if import_error("torch") else usable_machine(Silent())
    yield ok("device", f"{machine.name} ({machine.device})")
    checked = recipe or Recipe(model=Model(base="any/model"), data=Data(train="any/rows"))
    try:
        info = find_model_info(checked.model.base, checked.model.revision) if recipe else None
        choices = resolve_auto(checked, machine, info)[1]
    except UserError as error:
        yield broken("settings", str(error))
        return
    for choice in choices:
        message = str(choice).removeprefix(f"{choice.path}: auto is ")
        faster = _faster_format(str(choice.value)) if choice.path == "model.dtype" and not machine.is_gpu else ""
        if faster:
            remedy = "compare a few steps of both: --set train.steps=5"
            yield note(choice.path, message + faster, remedy, value=choice.value)
        elif recipe or choice.path in _BY_MACHINE:
            yield ok(choice.path, message, value=choice.value)


def _faster_format(chosen: str) -> str:
    """A clause on the other number format where it was measured as clearly faster on the processor."""
    other = {"float32": "bfloat16", "bfloat16": "float32"}.get(chosen)
    if other is None or import_error("torch"):
        return ""
    times = matmul_speed("cpu", other)[0] / matmul_speed("cpu", chosen)[0]
    return f"; but {other} was measured {times:.1f} times as fast" if times > _CLEARLY_FASTER else ""


def check_disk(run: Path | None) -> Iterator[DoctorFinding]:
    """The folders that commands write into: free space, size, and whether they can be written.

    `run` is a recipe's run folder; without a recipe, runs may go elsewhere than the current folder, which then only
    gets a note.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder, needed, remedy in (
        ("runs", run.absolute() if run else Path.cwd(), run is not None, "set another output.dir, or pass --output"),
        ("lorakit's cache", cache_folder(), True, "set LORAKIT_CACHE to another folder"),
        ("hub's cache", Path(HF_HUB_CACHE), False, "set HF_HUB_CACHE to another folder"),
    ):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        figures = {"free": shutil.disk_usage(existing).free}
        message = f"{folder}: {gibibytes(figures['free'])} free"
        if name != "runs":
            files = (Path(parent, file) for parent, _, names in os.walk(folder) for file in names)
            figures["size"] = sum(file.lstat().st_size for file in files)  # a link itself, not its file again
            message += f", {gibibytes(figures['size'])} in use"
        if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
            yield (broken if needed else note)(name, f"{message}, cannot be written", remedy, **figures)
        elif figures["free"] < _LITTLE_SPACE:
            yield note(name, f"{message}, which is little", f"free some, or {remedy}", **figures)
        else:
            yield ok(name, message, **figures)


@functools.cache
def matmul_speed(device: str, dtype: str) -> tuple[float, int]:
    """FLOP/s of a square matrix product, and its width; RuntimeError where the device cannot do it.

    A processor without instructions for the number format takes a quarter of a second for the width of 512.
    """
    import torch
    from torch.utils.benchmark import Timer

    width = 4096 if device == "cuda" else 512
    left, right = torch.rand(2, width, width).to(device, getattr(torch, dtype))
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    return 2 * width**3 / timer.blocked_autorange(min_run_time=0.2).median, width
