"""NVIDIA GPUs: what the driver shows, and whether this torch can use them."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorakit.amounts import gibibytes
from lorakit.doctor.check import DoctorFinding, broken, note, ok, require_import, root_cause
from lorakit.doctor.machine import measure_formats

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
        message = f"{gpu.name}, {gibibytes(gpu.memory)}, {gibibytes(gpu.free)} free"
        message += f", compute capability {gpu.capability}, driver {gpu.driver}"
        finding = DoctorFinding(f"GPU {number}", "ok", message, figures=asdict(gpu))
        if gpu.memory - gpu.free > _BUSY_SHARE * gpu.memory:
            message, remedy = f"{message}: other programs hold memory", "nvidia-smi lists them"
            finding = replace(finding, state="note", message=message, remedy=remedy)
        yield finding
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
        has_bfloat16 = torch.cuda.get_device_capability()[0] >= 8
        yield from measure_formats("cuda", "float32", "float16", *(["bfloat16"] if has_bfloat16 else []))
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


def parse_gpus(text: str) -> list[DriverGpu]:
    """What `nvidia-smi --query-gpu` printed, without header and units; a figure that it does not know is 0."""

    def to_bytes(mebibytes: str) -> int:
        return int(mebibytes) << 20 if mebibytes.isdigit() else 0

    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [DriverGpu(name, to_bytes(total), to_bytes(free), driver, cap) for name, total, free, driver, cap in rows]


def count_gpus_on_bus(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's display controllers on the PCI bus, with a driver or without (PCI's codes: vendor 10de, class 03)."""
    nvidia = [device for device in devices.glob("*") if (device / "vendor").read_text().startswith("0x10de")]
    return sum((device / "class").read_text().startswith("0x03") for device in nvidia)


def _hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


@functools.cache
def _driver_gpus() -> tuple[list[DriverGpu], str]:
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
