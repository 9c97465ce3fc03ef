"""What a container or a batch system lets this process have of the machine: Linux control groups, versions 1 and 2."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class CgroupLimits:
    """The limits of the control groups that this process is in; None where there is none."""

    memory: int | None = None
    """Bytes that the group may hold in all."""
    memory_left: int | None = None
    """Bytes of them that are free, file pages that can be given up included."""
    processors: float | None = None
    """Processor time a second: 1.5 are one and a half processors."""


def read_cgroup_limits(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> CgroupLimits:
    """The tightest limits of this process's groups and of the groups around them.

    The files and their meaning: the kernel's documentation, cgroup-v1/memory, scheduler/sched-bwc, and cgroup-v2.
    """
    memory = [found for folder in _folders(proc, groups, "memory") if (found := _memory(folder))]
    quotas = [quota for folder in _folders(proc, groups, "cpu") if (quota := _processors(folder))]
    return CgroupLimits(
        memory=min((limit for limit, _ in memory), default=None),
        memory_left=min((left for _, left in memory), default=None),
        processors=min(quotas, default=None),
    )


def _folders(proc: Path, groups: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups in which this process is, innermost first.

    In a container the file may name the host's path, of which only the root is seen: folders that are not there are
    left out.
    """
    path = proc / "self" / "cgroup"
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root in [groups / controllers, groups / controller] if controllers else [groups]:
            group = PurePosixPath(inside)
            for part in (group, *group.parents):
                folder = root / part.relative_to("/")
                if folder.is_dir():
                    yield folder


def _memory(folder: Path) -> tuple[int, int] | None:
    """The limit of one group in bytes, and how much of it is left."""
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None:
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or limit >= 1 << 60:  # version 1 writes the largest page-aligned number for "no limit"
        return None
    return limit, limit - (used or 0) + _idle_file_pages(folder / "memory.stat")


def _idle_file_pages(path: Path) -> int:
    pages = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        key, _, value = line.partition(" ")
        pages[key] = int(value)
    return pages.get("total_inactive_file", pages.get("inactive_file", 0))


def _processors(folder: Path) -> float | None:
    """The processor time a second of one group."""
    path = folder / "cpu.max"
    if path.is_file():
        quota, period = path.read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    allowed, each = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return allowed / each if allowed and each and allowed > 0 else None


def _number(path: Path) -> int | None:
    """The number in a file; None where the file is not there, or says `max`."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8").strip()
    return None if text == "max" else int(text)
