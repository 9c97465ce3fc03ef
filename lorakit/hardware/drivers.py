"""The GPUs of this machine, found without torch: as the tools of their drivers show them. NVIDIA's nvidia-smi, AMD's
amd-smi or rocm-smi, Intel's xpu-smi; on a Mac, sysctl. Only nvidia-smi was run; the others are read as they are
documented.
"""

import functools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Of a Mac's memory, the least that Metal recommends for the GPU (recommendedMaxWorkingSetSize): 21.8 of 32 GB
# (ggml-org/llama.cpp#1826), 11.84 of 16 GiB (AlexsJones/llmfit#754), 107.5 of 128 (antirez/ds4#909).
METAL_SHARE = 2 / 3
_TIMEOUT = 20  # seconds
# Maker -> the variables by which a process sees some of its GPUs only, the one that counts first (torch's
# cuda/__init__.py and xpu/__init__.py, `_parse_visible_devices`). ROCm goes by CUDA's as well.
VISIBLE = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "amd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "intel": ("ZE_AFFINITY_MASK",),
    "apple": (),
}


@dataclass(frozen=True)
class DriverGpu:
    """A GPU as its driver shows it; memory in bytes, 0 where it does not say."""

    name: str
    memory: int
    free: int
    driver: str
    capability: str  # NVIDIA's compute capability, AMD's instruction set (gfx942), or empty


def visible_names(maker: str) -> str | None:
    """What the environment shows of a maker's GPUs: their numbers or names by commas; None where it shows all."""
    return next((os.environ[name] for name in VISIBLE[maker] if name in os.environ), None)


def hides_gpus(maker: str = "nvidia") -> bool:
    """Whether the environment hides every GPU of a maker from this process."""
    return visible_names(maker) in ("", "-1")


@functools.cache
def read_driver_gpus(only: str = "") -> tuple[list[DriverGpu], str]:
    """The GPUs that NVIDIA's driver shows, or that `only` of them, and its error message."""
    query = "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap"
    text, error = run_tool("nvidia-smi", query, "--format=csv,noheader,nounits", *([f"--id={only}"] if only else []))
    return ([], error) if error else (parse_gpus(text), "")


def run_tool(tool: str, *arguments: str) -> tuple[str, str]:
    """What a tool printed, and why it failed; both empty where it is not installed."""
    if not shutil.which(tool):
        return "", ""
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{tool}: {error}"
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return "", f"{tool}: {lines[0] if lines else f'exit code {done.returncode}'}"
    return done.stdout, ""


def parse_gpus(text: str) -> list[DriverGpu]:
    """What `nvidia-smi --query-gpu` printed, without header and units; a figure that it does not know is 0."""

    def to_bytes(mebibytes: str) -> int:
        return int(mebibytes) << 20 if mebibytes.isdigit() else 0

    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 4]
    return [DriverGpu(name, to_bytes(total), to_bytes(free), driver, cap) for name, total, free, driver, cap in rows]


@functools.cache
def read_amd_gpus() -> tuple[list[DriverGpu], str]:
    """The GPUs that AMD's driver shows, and its error message."""
    shown = ("--showproductname", "--showmeminfo", "vram", "--showdriverversion")
    for tool, arguments, parse in (
        ("rocm-smi", (*shown, "--json"), parse_rocm_smi),  # tells what is free as well
        ("amd-smi", ("static", "--asic", "--vram", "--driver", "--json"), parse_amd_smi),
    ):
        text, error = run_tool(tool, *arguments)
        if text or error:
            return _parsed(tool, parse, text, error)
    return [], ""


def _parsed(tool: str, parse: Callable[[str], list[DriverGpu]], text: str, error: str) -> tuple[list[DriverGpu], str]:
    if error or not text:
        return [], error
    try:
        return parse(text), ""
    except (ValueError, KeyError, TypeError, AttributeError) as fault:  # a version with another format
        return [], f"{tool}: printed what lorakit does not understand ({type(fault).__name__}: {fault})"


def parse_rocm_smi(text: str) -> list[DriverGpu]:
    """What `rocm-smi --showproductname --showmeminfo vram --showdriverversion --json` printed: an object for each card
    (`card0`), and one for the system. The first letters of its keys have changed between versions."""
    printed = _read_json(text)
    cards = {name: card for name, card in printed.items() if re.fullmatch(r"card\d+", name)}
    driver = str(_lowered(printed.get("system", {})).get("driver version", ""))
    gpus = []
    for name in sorted(cards, key=lambda name: int(name.removeprefix("card"))):
        card = _lowered(cards[name])
        total, used = (_whole(card.get(f"vram total {what}memory (b)")) for what in ("", "used "))
        capability = str(card.get("gfx version", ""))
        series = card.get("card series", "N/A")
        known = f"AMD {capability}".strip() if series in ("N/A", "") else str(series)
        gpus.append(DriverGpu(known, total, max(total - used, 0), driver, capability))
    return gpus


def parse_amd_smi(text: str) -> list[DriverGpu]:
    """What `amd-smi static --asic --vram --driver --json` printed: a list of GPUs, in newer versions under `gpu_data`.
    It does not tell what is free: all of it is taken to be."""
    printed = _read_json(text)
    gpus = []
    for gpu in printed.get("gpu_data", []) if isinstance(printed, dict) else printed:
        asic, size, driver = gpu.get("asic", {}), gpu.get("vram", {}).get("size", {}), gpu.get("driver", {})
        # Its MB are MiB: an MI300X shows 196592 of them.
        memory = _whole(size.get("value")) << 20 if isinstance(size, dict) else 0
        capability = str(asic.get("target_graphics_version", ""))
        gpus.append(DriverGpu(str(asic["market_name"]), memory, memory, str(driver.get("version", "")), capability))
    return gpus


@functools.cache
def read_intel_gpus() -> tuple[list[DriverGpu], str]:
    """The first GPU that Intel's driver shows, and its error message."""
    text, error = run_tool("xpu-smi", "discovery", "-d", "0", "-j")
    return _parsed("xpu-smi", parse_xpu_smi, text, error)


def parse_xpu_smi(text: str) -> list[DriverGpu]:
    """What `xpu-smi discovery -d 0 -j` printed: an object of one GPU."""
    printed = _read_json(text)
    total, free = (_whole(printed.get(f"memory_{what}_size_byte")) for what in ("physical", "free"))
    return [DriverGpu(str(printed["device_name"]), total, free, str(printed.get("driver_version", "")), "")]


@functools.cache
def read_apple_gpus() -> tuple[list[DriverGpu], str]:
    """The GPU of a Mac with Apple's own chip."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return [], ""
    # Without a limit of the GPU's own there is no such name, and the exit code is 1: the others are printed.
    names = ("machdep.cpu.brand_string", "hw.memsize", "iogpu.wired_limit_mb")
    done = subprocess.run(["sysctl", *names], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    return parse_sysctl(done.stdout, platform.mac_ver()[0]), ""


def parse_sysctl(text: str, version: str) -> list[DriverGpu]:
    """What `sysctl machdep.cpu.brand_string hw.memsize iogpu.wired_limit_mb` printed on a Mac with this version of
    macOS: the GPU may take the limit that was set for it, or else what Metal recommends (torch knows it exactly)."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    limit = _whole(values.get("iogpu.wired_limit_mb")) << 20
    memory = limit or int(_whole(values.get("hw.memsize")) * METAL_SHARE)
    return [DriverGpu(values["machdep.cpu.brand_string"], memory, memory, f"macOS {version}", "")] if memory else []


# Makers beside NVIDIA: the type of device as torch calls it, and how its GPUs are found.
_OTHER_MAKERS = {
    "amd": ("cuda", read_amd_gpus),
    "intel": ("xpu", read_intel_gpus),
    "apple": ("mps", read_apple_gpus),
}


def read_other_gpus() -> tuple[str, list[DriverGpu]]:
    """The visible GPUs of the first maker beside NVIDIA that has any here, and the type of device that they are."""
    for maker, (device, read) in _OTHER_MAKERS.items():
        if not hides_gpus(maker) and (gpus := select_visible(read()[0], visible_names(maker))):
            return device, gpus
    return "cpu", []


def select_visible(gpus: Sequence[DriverGpu], names: str | None) -> list[DriverGpu]:
    """The GPUs that a process sees, in its order, where the environment shows these `names` alone. One that is named by
    its UUID is not looked for: the cards of a machine are alike."""
    if names is None:
        return list(gpus)
    numbers = [name.strip() for name in names.split(",")]
    chosen = [int(number) if number.isdigit() else at for at, number in enumerate(numbers)]
    return [gpus[at] for at in chosen if at < len(gpus)]


def _read_json(text: str) -> Any:
    """The JSON in a tool's output, which may begin with warnings."""
    begin = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=0)
    return json.loads(text[begin:])


def _lowered(values: dict[str, Any]) -> dict[str, Any]:
    return {name.lower(): value for name, value in values.items()}


def _whole(value: Any) -> int:
    """A whole number that a tool wrote; 0 where it wrote none."""
    return int(value) if str(value).isdigit() else 0
