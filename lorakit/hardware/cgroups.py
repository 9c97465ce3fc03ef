"""The limits that a container or a batch system puts on this process: Linux control groups, versions 1 and 2 (the
kernel's documentation: cgroup-v1/memory, scheduler/sched-bwc, cgroup-v2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


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
    for line in text_of(proc / "self" / "cgroup").splitlines():
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
    stat = dict(line.split(" ", 1) for line in text_of(folder / "memory.stat").splitlines())
    idle_file_pages = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return limit, limit - (used or 0) + idle_file_pages


def _processor_quota(folder: Path) -> float | None:
    if text := text_of(folder / "cpu.max"):
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _number(path: Path) -> int | None:
    """The number in a file; None where the file is not there, or says `max`."""
    text = text_of(path).strip()
    return None if text in ("", "max") else int(text)


def text_of(path: Path) -> str:
    """The text of a file of the kernel's; empty where it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
