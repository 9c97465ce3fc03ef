"""Room on disk where runs and caches go, and what the caches hold already."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorakit.atomic_io import cache_folder
from lorakit.doctor.finding import CheckResult, gib

# An adapter's run takes megabytes; a merged model, or one from the hub, several of these.
_LITTLE_ROOM = 10 << 30


def rooms(run: Path | None) -> Iterator[CheckResult]:
    """The folders that commands write into: free room, size, and whether they can be written.

    `run` is a recipe's run folder; without a recipe runs may go elsewhere than here, so that nothing is broken then.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path.cwd() if run is None else run.absolute()
    yield _room("runs", folder, "write another output.dir, or give --output", needed=run is not None)
    yield _room("lorakit's cache", cache_folder(), "set LORAKIT_CACHE to another folder", needed=True, sized=True)
    yield _room("hub's cache", Path(HF_HUB_CACHE), "set HF_HUB_CACHE to another folder", needed=False, sized=True)


def size_of(folder: Path) -> int:
    """The bytes that the files below a folder take; links are not followed, so nothing is counted twice."""
    if not folder.is_dir():
        return 0
    size = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                size += size_of(Path(entry.path))
            else:
                size += entry.stat(follow_symlinks=False).st_size
    return size


def _room(name: str, folder: Path, elsewhere: str, needed: bool, sized: bool = False) -> CheckResult:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    figures, said = {"free": free}, f"{folder}: {gib(free)} free"
    if sized:
        figures["size"] = size_of(folder)
        said += f", {gib(figures['size'])} in use" if folder.is_dir() else ", nothing there yet"
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        return CheckResult(name, "broken" if needed else "note", f"{said}, cannot be written", elsewhere, figures)
    if free < _LITTLE_ROOM:
        return CheckResult(name, "note", f"{said}, which is little", f"free some, or {elsewhere}", figures)
    return CheckResult(name, "ok", said, figures=figures)
