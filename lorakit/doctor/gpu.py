"""NVIDIA GPUs: what the driver shows, and whether this torch can use them."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lorakit.doctor.finding import CheckResult, gib, reason
from lorakit.doctor.packages import import_error
from lorakit.doctor.speed import product_speed

_QUERY = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")
# The desktop, and other programs' contexts, take some; more than this share is another run.
_TAKEN = 0.1


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi shows it; memory in bytes."""

    name: str
    memory: int
    free: int
    driver: str
    capability: str


def cards() -> Iterator[CheckResult]:
    """Each GPU of this machine, hidden or not."""
    found, complaint = _seen()
    if not found and gpus_on_bus():
        said = complaint or "an NVIDIA GPU is in this machine, and no driver that shows it"
        yield CheckResult("driver", "broken", said, "install NVIDIA's driver; reboot where it was just updated")
        return
    for number, card in enumerate(found):
        yield _finding(f"GPU {number}", card)
    if not found:
        yield CheckResult("GPU", "note", "there is no NVIDIA GPU: runs use the processor")
    elif _hidden():
        yield CheckResult("visible", "note", "CUDA_VISIBLE_DEVICES hides every GPU: runs use the processor")
    elif len(found) > 1:
        used = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        yield CheckResult(
            "used",
            "note",
            f"a run uses one of the {len(found)} GPUs: {f'GPU {used}' if used.isdigit() else used}",
            "CUDA_VISIBLE_DEVICES=1 before a command makes it another",
        )


def torch_on_gpu() -> Iterator[CheckResult]:
    """Whether torch reaches the GPU, by a real product in each number format."""
    if import_error("torch"):
        yield CheckResult("torch on GPU", "note", "not tried, since torch cannot be imported")
        return
    import torch

    here = [] if _hidden() else _seen()[0]
    if torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        yield CheckResult("torch on GPU", "ok", f"{torch.__version__} uses the GPU by {build}")
        yield from _products(torch.cuda.get_device_capability()[0] >= 8)
    elif here and torch.version.cuda is None:
        remedy = "pip install --force-reinstall torch, where pip is not set to take the CPU build"
        yield CheckResult(
            "torch on GPU", "broken", f"{torch.__version__} is a build without CUDA: the GPU stays idle", remedy
        )
    elif here:
        yield CheckResult(
            "torch on GPU",
            "broken",
            f"{torch.__version__}, built for CUDA {torch.version.cuda}, cannot use the GPU: {_refusal()}",
            f"update the driver (now {here[0].driver}), or install torch built for an older CUDA",
        )
    else:
        yield CheckResult("torch on GPU", "ok", f"{torch.__version__} has none to use")


def cards_in(text: str) -> list[Card]:
    """What `nvidia-smi --query-gpu` printed, without header and units; a figure that it does not know is 0."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Card(name, _bytes(total), _bytes(free), driver, cap) for name, total, free, driver, cap in rows]


def gpus_on_bus(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's display controllers on the PCI bus, with a driver or without (PCI's codes: vendor 10de, class 03)."""
    found = 0
    for device in devices.glob("*"):
        vendor, kind = ((device / name).read_text(encoding="utf-8") for name in ("vendor", "class"))
        found += vendor.startswith("0x10de") and kind.startswith("0x03")
    return found


def _hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


@functools.cache
def _seen() -> tuple[list[Card], str]:
    """The GPUs that the driver shows, and what it complains of."""
    if not shutil.which("nvidia-smi"):
        return [], ""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return [], f"nvidia-smi: {said[0] if said else f'exit code {done.returncode}'}"
    return cards_in(done.stdout), ""


def _bytes(mebibytes: str) -> int:
    return int(mebibytes) << 20 if mebibytes.isdigit() else 0


def _finding(name: str, card: Card) -> CheckResult:
    said = f"{card.name}, {gib(card.memory)}, {gib(card.free)} free, "
    said += f"compute capability {card.capability}, driver {card.driver}"
    figures = asdict(card)
    if card.memory - card.free > _TAKEN * card.memory:
        return CheckResult(name, "note", f"{said}: other programs hold memory", "nvidia-smi lists them", figures)
    return CheckResult(name, "ok", said, figures=figures)


def _products(bfloat16: bool) -> Iterator[CheckResult]:
    for dtype in ("float32", "float16", *(["bfloat16"] if bfloat16 else [])):
        try:
            speed, size = product_speed("cuda", dtype)
        except RuntimeError as error:
            yield CheckResult(
                dtype,
                "broken",
                f"a matrix product fails: {reason(error)}",
                "install a build of torch for this GPU's compute capability and driver",
            )
            return
        yield CheckResult(
            dtype, "ok", f"{speed / 1e12:,.1f} TFLOP/s, measured on {size} x {size}", figures={"speed": speed}
        )


def _refusal() -> str:
    """What CUDA says when it is started."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return reason(error)
    return "it finds no device"
