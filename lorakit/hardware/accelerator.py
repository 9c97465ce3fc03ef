"""The GPU that torch computes on, whoever made it: `cuda` (NVIDIA's, and AMD's, for ROCm shows itself as CUDA), `xpu`
(Intel's) and `mps` (Apple's). torch.accelerator is what these have in common; here is the rest of what a training
needs of them. Nothing but `cuda` on NVIDIA's cards was run (docs/devices.md).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Those that we know; torch has more.
ACCELERATORS = ("cuda", "xpu", "mps")
# Before it torch.accelerator does not measure memory on Metal (pytorch/pytorch#186748).
_METAL_FROM = (2, 13)
# Metal has no float64, and some of Intel's cards have none (`torch.xpu.get_device_properties().has_fp64`).
_WITHOUT_FLOAT64 = ("xpu", "mps")


def current_accelerator() -> str | None:
    """The type of the GPU that this torch was built for and can use now, if we know it: `cuda`, `xpu` or `mps` (from
    torch 2.13 on)."""
    current = torch.accelerator.current_accelerator(check_available=True)
    kind = current.type if current is not None else ""
    return kind if kind in ACCELERATORS and (kind != "mps" or torch.__version__ >= _METAL_FROM) else None


def gpu_of_torch(device: str) -> tuple[str, int, bool]:
    """The first GPU of a type as torch knows it: its name, the bytes that it has for us, whether it has bfloat16."""
    if device == "mps":  # whose memory is the processor's as well
        return "Apple GPU", torch.mps.recommended_max_memory(), torch.backends.mps.is_macos_or_newer(14, 0)
    gpu = torch.get_device_module(device).get_device_properties(0)
    return gpu.name, gpu.total_memory, device == "xpu" or gpu.major >= 8  # of AMD's all, from gfx900 on


@functools.cache
def memory_of(device: torch.device) -> int:
    """The bytes of memory that a GPU has for us."""
    return gpu_of_torch(device.type)[1]


def free_memory_of(device: torch.device) -> int:
    """The bytes that are free on a GPU, those in torch's own spare blocks not counted."""
    return int(torch.accelerator.get_memory_info(device)[0])


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers in float64: where it is, or on the processor where its device has no such numbers."""
    return tensor.cpu().double() if tensor.device.type in _WITHOUT_FLOAT64 else tensor.double()


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that work on `device` draws from: the processor's, and the device's own."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_random_states(device: torch.device, states: list[torch.Tensor]) -> None:
    """Put the generators back to what `random_states` of the same device gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def restoring_random_states(device: torch.device | None = None) -> Iterator[None]:
    """Random numbers drawn within leave no trace: the processor's generator and that of `device`, or of every GPU
    where none is named, are afterwards as before."""
    kind = current_accelerator() if device is None else device.type
    devices: list[Any] = []
    if device is None and kind:
        devices = list(range(torch.accelerator.device_count()))
    elif device is not None and device.type != "cpu":
        devices = [device]
    with torch.random.fork_rng(devices, device_type=kind if devices else None):
        yield
