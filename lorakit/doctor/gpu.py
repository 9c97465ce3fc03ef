"""NVIDIA GPUs: what the driver shows, and whether this torch can use them."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lorakit.amounts import gibibytes
from lorakit.doctor.check import DoctorFinding, broken, note, ok, require_import, root_cause
from lorakit.doctor.machine import matmul_speed

# The desktop, and other programs' contexts, take some; more than this share is another run.
_BUSY_SHARE = 0.1


@dataclass(frozen=True)
class DriverGpu:
    """A GPU as nvidia-smi shows it; memory in bytes."""

    name: str
    memory: int
    free: int
    driver: str
    capability: str


def check_gpus() -> Iterator[DoctorFinding]:
    """Each GPU of this machine, hidden or not."""
    gpus, error = _driver_gpus()
    if not gpus and count_gpus_on_bus():
        message = error or "an NVIDIA GPU is in this machine, but no driver shows it"
        yield broken("driver", message, "install NVIDIA's driver; reboot if it was just updated")
        return
    for number, gpu in enumerate(gpus):
        message = (
            f"{gpu.name}, {gibibytes(gpu.memory)}, {gibibytes(gpu.free)} free, "
            f"compute capability {gpu.capability}, driver {gpu.driver}"
        )
        if gpu.memory - gpu.free > _BUSY_SHARE * gpu.memory:
            message = f"{message}: other programs hold memory"
            yield DoctorFinding(f"GPU {number}", "note", message, "nvidia-smi lists them", asdict(gpu))
        else:
            yield DoctorFinding(f"GPU {number}", "ok", message, figures=asdict(gpu))
    if not gpus:
        yield note("GPU", "there is no NVIDIA GPU: runs use the processor")
    elif _hidden():
        yield note("visible", "CUDA_VISIBLE_DEVICES hides every GPU: runs use the processor")
    elif len(gpus) > 1:
        used = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        message = f"a run uses one of the {len(gpus)} GPUs: {f'GPU {used}' if used.isdigit() else used}"
        yield note("used", message, "set CUDA_VISIBLE_DEVICES=1 before a command to choose another")


def check_torch() -> Iterator[DoctorFinding]:
    """Whether torch reaches the GPU, by a real product in each number format."""
    require_import("torch")
    import torch

    version, cuda = torch.__version__, torch.version.cuda
    gpus = [] if _hidden() else _driver_gpus()[0]
    if torch.cuda.is_available():
        build = f"CUDA {cuda}" if cuda else f"ROCm {torch.version.hip}"
        yield ok("torch on GPU", f"{version} uses the GPU by {build}")
        yield from _check_speed(torch.cuda.get_device_capability()[0] >= 8)
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


def _check_speed(bfloat16: bool) -> Iterator[DoctorFinding]:
    for dtype in ("float32", "float16", *(["bfloat16"] if bfloat16 else [])):
        try:
            speed, width = matmul_speed("cuda", dtype)
        except RuntimeError as error:
            remedy = "install a build of torch for this GPU's compute capability and driver"
            yield broken(dtype, f"a matrix product fails: {root_cause(error)}", remedy)
            return
        yield ok(dtype, f"{speed / 1e12:,.1f} TFLOP/s, measured on {width} x {width}", speed=speed)


def parse_gpus(text: str) -> list[DriverGpu]:
    """What `nvidia-smi --query-gpu` printed, without header and units; a figure that it does not know is 0."""

    def to_bytes(mebibytes: str) -> int:
        return int(mebibytes) << 20 if mebibytes.isdigit() else 0

    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [DriverGpu(name, to_bytes(total), to_bytes(free), driver, cap) for name, total, free, driver, cap in rows]


def count_gpus_on_bus(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's display controllers on the PCI bus, with a driver or without (PCI's codes: vendor 10de, class 03)."""
    codes = (
        [(device / name).read_text(encoding="utf-8") for name in ("vendor", "class")] for device in devices.glob("*")
    )
    return sum(vendor.startswith("0x10de") and kind.startswith("0x03") for vendor, kind in codes)


def _hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


@functools.cache
def _driver_gpus() -> tuple[list[DriverGpu], str]:
    """The GPUs that the driver shows, and its error message."""
    if not shutil.which("nvidia-smi"):
        return [], ""
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return [], f"nvidia-smi: {lines[0] if lines else f'exit code {done.returncode}'}"
    return parse_gpus(done.stdout), ""
