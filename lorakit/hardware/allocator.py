"""How torch's allocator for CUDA keeps memory. By default it takes segments of the size that is asked for, and what is
free between two tensors of one micro-batch is often too small for those of the next, which is longer: with expandable
segments it maps pages behind each other, and little is lost (c10/cuda/CUDACachingAllocator.cpp)."""

import os
import platform
import sys

# torch reads them when the first tensor is put on a card; the others are older names of the first.
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_EXPANDABLE = "expandable_segments:True"


def allocator_settings() -> str:
    """What the environment says to torch's allocator, as `NAME=VALUE`; empty where it says nothing."""
    return next((f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)), "")


def use_expandable_segments() -> None:
    """Let the allocator expand its segments, where nobody has set it otherwise; before a tensor is on a card. Only
    Linux itself can: not Windows, and not its subsystem for Linux."""
    if sys.platform == "linux" and "microsoft" not in platform.release().lower() and not allocator_settings():
        os.environ[SETTINGS[0]] = _EXPANDABLE


def describe_allocator() -> str:
    """The setting in effect, in words."""
    settings = allocator_settings()
    if settings == f"{SETTINGS[0]}={_EXPANDABLE}":
        return "memory of the card: in expandable segments"
    return f"memory of the card: as {settings} says" if settings else "memory of the card: by torch's defaults"
