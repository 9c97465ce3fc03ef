"""What this machine is, found without loading torch, and the limits that a container or a batch system puts on this
process: Linux control groups, versions 1 and 2 (the kernel's documentation: cgroup-v1/memory, scheduler/sched-bwc,
cgroup-v2).
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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
        reason = f"this torch ({torch.__version__}) cannot use it"
        progress.warn(f"{seen.name} is here, but {reason}: running on the processor")
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
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()  # oneDNN, which multiplies for torch, goes by it
    has_tiles = "amx_bf16" in flags.split() and ("AMX" in limit or limit in ("ALL", "DEFAULT"))
    return Machine("cpu", name or "CPU", free if left is None else min(free, left), has_tiles)


def _proc_value(file: str, key: str) -> str:
    """What a file of /proc says first of something; empty where it says nothing."""
    line = re.search(rf"^{key}\s*:(.*)$", _text_of(Path("/proc") / file), re.MULTILINE)
    return line[1].strip() if line else ""


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@dataclass(frozen=True)
class CgroupLimits:
    """The limits of the control groups that this process is in; None where there is none."""

    memory: int | None = None  # bytes that the group may hold in all
    memory_left: int | None = None  # bytes of them that are free, file pages that can be given up included
    processors: float | None = None  # processor time a second: 1.5 are one and a half processors


def read_cgroup_limits(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> CgroupLimits:
    """The tightest limits of this process's groups and of the groups around them."""
    memory = [limits for folder in _group_folders(proc, groups, "memory") if (limits := _memory_limits(folder))]
    quotas = [quota for folder in _group_folders(proc, groups, "cpu") if (quota := _processor_quota(folder))]
    tightest = min((limit for limit, _ in memory), default=None)
    return CgroupLimits(tightest, min((left for _, left in memory), default=None), min(quotas, default=None))


def _group_folders(proc: Path, groups: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups of this process, innermost first. In a container the file may name the host's path, of
    which only the root is visible: folders that are not there are left out."""
    for line in _text_of(proc / "self" / "cgroup").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = PurePosixPath(inside)
        for root in [groups / controllers, groups / controller] if controllers else [groups]:
            folders = (root / part.relative_to("/") for part in (group, *group.parents))
            yield from (folder for folder in folders if folder.is_dir())


def _memory_limits(folder: Path) -> tuple[int, int] | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None:
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or limit >= 1 << 60:  # version 1 writes the largest page-aligned number for "no limit"
        return None
    stat = dict(line.split(" ", 1) for line in _text_of(folder / "memory.stat").splitlines())
    idle_file_pages = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return limit, limit - (used or 0) + idle_file_pages


def _processor_quota(folder: Path) -> float | None:
    if text := _text_of(folder / "cpu.max"):
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _number(path: Path) -> int | None:
    """The number in a file; None where the file is not there, or says `max`."""
    text = _text_of(path).strip()
    return None if text in ("", "max") else int(text)
