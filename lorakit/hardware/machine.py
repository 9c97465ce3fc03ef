"""What this machine is, found without loading torch."""

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lorakit.hardware.cgroups import read_cgroup_limits
from lorakit.hardware.gpus import Gpu, match_gpu
from lorakit.progress import Progress


@dataclass(frozen=True)
class Machine:
    """The device that a run uses. `memory` is the device's, in bytes: free RAM on a CPU, total memory on a GPU."""

    device: str  # "cpu" or "cuda"
    name: str
    memory: int
    bfloat16: bool
    here: bool = True  # whether it is the machine that this runs on, and not one that is planned for
    card: Gpu | None = None  # the card of the table that it is, whose rates are known

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"


@functools.cache
def this_machine() -> Machine:
    """The first visible NVIDIA GPU, else the processor."""
    return _first_gpu() or processor()


def machine_with(card: Gpu) -> Machine:
    """A machine with this card, to plan for."""
    return Machine("cuda", card.name, card.memory, card.bfloat16 is not None, here=False, card=card)


def usable_machine(progress: Progress) -> Machine:
    """The device that torch can really use: a driver may show a GPU to a torch without CUDA, or hide one from us."""
    import torch

    seen = this_machine()
    if seen.is_gpu == torch.cuda.is_available():
        return seen
    if seen.is_gpu:
        progress.warn(
            f"{seen.name} is here, but this torch ({torch.__version__}) cannot use it: running on the processor"
        )
        return processor()
    gpu = torch.cuda.get_device_properties(0)
    return Machine("cuda", gpu.name, gpu.total_memory, gpu.major >= 8, card=match_gpu(gpu.name, gpu.total_memory))


def _first_gpu() -> Machine | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    if visible:
        query.append(f"--id={visible.split(',')[0]}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        name, mebibytes, capability = (cell.strip() for cell in done.stdout.splitlines()[0].split(","))
        memory = int(mebibytes) << 20
        return Machine("cuda", name, memory, float(capability) >= 8.0, card=match_gpu(name, memory))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def processor() -> Machine:
    """This machine's processor, as the device of a run."""
    flags, name = _proc_value("cpuinfo", "flags"), _proc_value("cpuinfo", "model name")
    available, left = _proc_value("meminfo", "MemAvailable"), read_cgroup_limits().memory_left
    free = int(available.split()[0]) << 10 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("cpu", name or "CPU", free if left is None else min(free, left), "amx_bf16" in flags.split())


def _proc_value(file: str, key: str) -> str:
    """What a file of /proc says first of something; empty where it says nothing."""
    path = Path("/proc") / file
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    line = re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE)
    return line[1].strip() if line else ""
