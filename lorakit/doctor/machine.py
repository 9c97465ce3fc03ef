"""GPUs, threads, speed, main memory and disk, and what this process may use of them; what `auto` makes of it; and
bitsandbytes, by real calls on the device of a run.
"""

import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.amounts import gibibytes
from lorakit.atomic_io import cache_folder
from lorakit.doctor.check import DoctorFinding, broken, import_error, note, ok, require_import, root_cause
from lorakit.errors import UserError
from lorakit.hardware.cgroups import read_cgroup_limits
from lorakit.hardware.devices import visible_gpus
from lorakit.hardware.drivers import hides_gpus, read_driver_gpus, read_other_gpus
from lorakit.hardware.machine import processor, this_machine, usable_machine
from lorakit.hardware.threads import usable_processors
from lorakit.hardware.unsupported import UNSUPPORTED
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
# The desktop, and other programs' contexts, take some; more than this share is another run.
_BUSY_SHARE = 0.1


def check_threads() -> Iterator[DoctorFinding]:
    """The threads that torch computes in, against the cores that it may use."""
    require_import("torch")
    import torch

    used, usable = torch.get_num_threads(), usable_processors()
    message = f"torch computes in {used} thread{'s' if used > 1 else ''}"
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


def measure_formats(device: str, *dtypes: str) -> Iterator[DoctorFinding]:
    """The speed of a matrix product on a device in each number format, up to the first that fails."""
    require_import("torch")
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
    figures = {"total": total, "available": available}
    message = f"{gibibytes(available)} of {gibibytes(total)} are free"
    if limit is not None and limit < total:
        figures["limit"], message = limit, f"{message}; the container or batch system allows {gibibytes(limit)}"
    if available < _LITTLE_MEMORY:
        remedy = "close other programs: a model of 1B parameters alone takes 4 GB in float32"
        yield note("memory", message, remedy, **figures)
    else:
        yield ok("memory", message, **figures)


def check_choices(recipe: "Recipe | None") -> Iterator[DoctorFinding]:
    """What `auto` chooses here, with its reason (without a recipe, what depends on the machine alone); of the number
    format also whether the measured speed agrees. A setting of the recipe that cannot work here is broken."""
    from lorakit.plan.auto import resolve_auto  # imported here, since a broken pydantic must not end the other checks
    from lorakit.plan.model_info import find_model_info
    from lorakit.recipe.schema import Data, Model, Recipe

    # The device that a run would use; the driver's answer where torch cannot be imported.
    machine = this_machine() if import_error("torch") else usable_machine(Silent())
    yield ok("device", f"{machine.name} ({machine.device})")
    checked = recipe or Recipe(model=Model(base="any/model"), data=Data(train="any/rows"))
    try:
        model = checked.model
        info = find_model_info(model.base, model.revision, model.add_tokens) if recipe else None
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
    """The folders that commands write into: free space, size, and whether they can be written. `run` is a recipe's run
    folder; without one, runs may go elsewhere than the current folder, which then only gets a note."""
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
    """FLOP/s of a square matrix product, and its width; RuntimeError where the device cannot do it. A processor without
    instructions for the number format takes a quarter of a second for the width of 512."""
    import torch
    from torch.utils.benchmark import Timer

    width = 512 if device == "cpu" else 4096
    left, right = torch.rand(2, width, width).to(device, getattr(torch, dtype))
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    return 2 * width**3 / timer.blocked_autorange(min_run_time=0.2).median, width


def check_gpus() -> Iterator[DoctorFinding]:
    """Each GPU of this machine, hidden or not."""
    gpus, error = read_driver_gpus()
    if not gpus and count_gpus_on_bus():
        message = error or "an NVIDIA GPU is in this machine, but no driver shows it"
        yield broken("driver", message, "install NVIDIA's driver; reboot if it was just updated")
        return
    for number, gpu in enumerate(gpus):
        message = f"{gpu.name}, {gibibytes(gpu.memory)}, {gibibytes(gpu.free)} free"
        message += f", compute capability {gpu.capability}, driver {gpu.driver}"
        finding = DoctorFinding(f"GPU {number}", "ok", message, figures=asdict(gpu))
        if gpu.memory - gpu.free > _BUSY_SHARE * gpu.memory:
            message, remedy = f"{message}: other programs hold memory", "nvidia-smi lists them"
            finding = replace(finding, state="note", message=message, remedy=remedy)
        yield finding
    device, others = read_other_gpus()
    for number, gpu in enumerate(others):
        message = f"{gpu.name} ({device}), {gibibytes(gpu.memory)}, driver {gpu.driver}; lorakit was not run on one"
        yield DoctorFinding(f"GPU {number}", "ok", message, figures=asdict(gpu))
    if not gpus and not others:
        yield note("GPU", "there is no GPU that can be seen: runs use the processor")
    elif gpus and hides_gpus():
        yield note("visible", "CUDA_VISIBLE_DEVICES hides every GPU: runs use the processor")
    elif len(gpus) > 1:
        visible = visible_gpus()
        message = f"a training uses {len(visible)} of the {len(gpus)} GPUs, one process each"
        if len({gpu.name for gpu in visible}) > 1:
            message += ", at the pace of the slowest and within the memory of the smallest"
        yield ok("used", message, used=len(visible))


def check_torch() -> Iterator[DoctorFinding]:
    """Whether torch reaches the GPU, by a real product in each number format."""
    require_import("torch")
    import torch

    from lorakit.hardware.accelerator import current_accelerator, gpu_of_torch

    version, cuda, device = torch.__version__, torch.version.cuda, current_accelerator()
    gpus = [] if hides_gpus() else read_driver_gpus()[0]
    kind, others = read_other_gpus()
    if device:
        yield ok("torch on GPU", f"{version} uses the GPU by {_build(device)}")
        has_bfloat16 = gpu_of_torch(device)[2]
        yield from measure_formats(device, "float32", "float16", *(["bfloat16"] if has_bfloat16 else []))
    elif others and not gpus:
        remedy = "install torch's build for ROCm" if kind == "cuda" else f"install torch's build with {kind}"
        yield broken("torch on GPU", f"{version} cannot use {others[0].name}: the GPU stays idle", remedy)
    elif not gpus:
        yield ok("torch on GPU", f"{version} has none to use")
    elif cuda is None:
        remedy = "pip install --force-reinstall torch, where pip is not set to take the CPU build"
        yield broken("torch on GPU", f"{version} is a build without CUDA: the GPU stays idle", remedy)
    else:
        try:
            torch.cuda.init()
            reason = "it finds no device"
        except (RuntimeError, AssertionError) as error:
            reason = root_cause(error)
        remedy = f"update the driver (now {gpus[0].driver}), or install torch built for an older CUDA"
        yield broken("torch on GPU", f"{version}, built for CUDA {cuda}, cannot use the GPU: {reason}", remedy)


def _build(device: str) -> str:
    """What torch reaches a GPU by."""
    import torch

    if device == "cuda":
        return f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return {"xpu": "XPU (Intel's)", "mps": "Metal"}[device]


def count_gpus_on_bus(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's display controllers on the PCI bus, with a driver or without (PCI's codes: vendor 10de, class 03)."""
    nvidia = [device for device in devices.glob("*") if (device / "vendor").read_text().startswith("0x10de")]
    return sum((device / "class").read_text().startswith("0x03") for device in nvidia)


_WIDTH, _ROWS, _RATE = 256, 32, 0.01
_REINSTALL = "pip install --force-reinstall bitsandbytes; python -m bitsandbytes says more"
# Quantization -> the largest relative error of a product that is no fault. Gaussian weights lose 0.092 in NF4, 0.122 in
# FP4 and 0.008 in int8, to which CUDA adds as much for the inputs.
_LARGEST_ERROR = {"nf4": 0.12, "q4": 0.16, "q8": 0.03}


def check_bitsandbytes() -> Iterator[DoctorFinding]:
    """A quantized layer of each kind against the product with the plain weight, and a step of the 8-bit optimizer."""
    require_import("torch", "bitsandbytes")
    from lorakit.hardware.accelerator import current_accelerator

    device = current_accelerator() or "cpu"
    for quantization, limit in _LARGEST_ERROR.items():
        try:
            forward, backward = _layer_errors(quantization, device)
        except Exception as error:  # a broken build raises all sorts of errors: each kind is tried for itself
            message = f"a layer on {device} fails: {type(error).__name__}: {root_cause(error)}"
            yield broken(quantization, message, _REINSTALL)
            continue
        message = f"on {device} the relative error is {forward:.3f} forward, {backward:.3f} backward"
        figures = {"forward": forward, "backward": backward}
        if max(forward, backward) <= limit:
            yield ok(quantization, message, **figures)
        else:
            yield broken(quantization, f"{message}: over {limit}", _REINSTALL, **figures)
    if unsupported := UNSUPPORTED.get((device, "train.optimizer", "adamw-8bit")):
        yield note("adamw-8bit", unsupported.reason, f"train.optimizer: {unsupported.instead}")
        return
    moved = _first_step(device)
    message = f"a first step on {device} moves by {moved:.4g} at a learning rate of {_RATE}"
    fine = abs(moved - _RATE) < 0.1 * _RATE
    yield ok("adamw-8bit", message) if fine else broken("adamw-8bit", f"{message}, by which it should", _REINSTALL)


def _first_step(device: str) -> float:
    """How far the first step of the 8-bit optimizer moves a number: by the learning rate, where it is right."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    before = torch.randn(8192, generator=torch.Generator().manual_seed(0)).to(device)
    trained = torch.nn.Parameter(before.clone())
    optimizer = AdamW8bit([trained], lr=_RATE, weight_decay=0.0)
    (trained**2).sum().backward()
    optimizer.step()
    return float((trained.detach() - before).abs().mean())


def _layer_errors(quantization: str, device: str) -> tuple[float, float]:
    """The relative errors of a quantized layer's output and of the gradient of its input, on random weights."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
    layer = _quantized_layer(quantization, weight, dtype).to(device)
    inputs = torch.randn(_ROWS, _WIDTH, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(_ROWS, _WIDTH, generator=generator).to(device, dtype)
    outputs = layer(inputs)
    outputs.backward(gradient)
    plain = weight.to(device)
    pairs = ((outputs, inputs.detach().float() @ plain.T), (inputs.grad, gradient.float() @ plain))
    forward, backward = (float((computed.float() - exact).norm() / exact.norm()) for computed, exact in pairs)
    return forward, backward


def _quantized_layer(quantization: str, weight: Any, dtype: Any) -> Any:
    """A layer that quantizes the weight when it is moved to its device, as a model's layers do."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    if quantization == "q8":
        layer = Linear8bitLt(_WIDTH, _WIDTH, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        return layer
    kind = "fp4" if quantization == "q4" else quantization
    layer = Linear4bit(_WIDTH, _WIDTH, bias=False, quant_type=kind, compute_dtype=dtype)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
    return layer
