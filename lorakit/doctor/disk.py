"""Disk space where runs and caches go, and how much the caches use."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorakit.amounts import gibibytes
from lorakit.atomic_io import cache_folder
from lorakit.doctor.check import DoctorFinding

# An adapter's run takes megabytes; a merged model, or one from the hub, several of these.
_LITTLE_SPACE = 10 << 30


def check_folders(run: Path | None) -> Iterator[DoctorFinding]:
    """The folders that commands write into: free space, size, and whether they can be written.

    `run` is a recipe's run folder; without a recipe, runs may go elsewhere than the current folder, which then only
    gets a note.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path.cwd() if run is None else run.absolute()
    yield _check_folder("runs", folder, "set another output.dir, or pass --output", needed=run is not None)
    yield _check_folder(
        "lorakit's cache", cache_folder(), "set LORAKIT_CACHE to another folder", needed=True, with_size=True
    )
    hub = Path(HF_HUB_CACHE)
    yield _check_folder("hub's cache", hub, "set HF_HUB_CACHE to another folder", needed=False, with_size=True)


def _check_folder(name: str, folder: Path, remedy: str, needed: bool, with_size: bool = False) -> DoctorFinding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    figures, message = {"free": free}, f"{folder}: {gibibytes(free)} free"
    if with_size:
        files = (Path(parent, file) for parent, _, names in os.walk(folder) for file in names)
        figures["size"] = sum(
            file.lstat().st_size for file in files
        )  # a link counts by itself, so nothing counts twice
        message += f", {gibibytes(figures['size'])} in use" if folder.is_dir() else ", not created yet"
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        return DoctorFinding(name, "broken" if needed else "note", f"{message}, cannot be written", remedy, figures)
    if free < _LITTLE_SPACE:
        return DoctorFinding(name, "note", f"{message}, which is little", f"free some, or {remedy}", figures)
    return DoctorFinding(name, "ok", message, figures=figures)
