"""Which device each process computes on: its own, and it sees no other.

A process is bound by the variable that restricts what the maker's runtime shows it, before that runtime starts, which
reads it once. So nothing here may ask the runtime for devices first: torch counts NVIDIA's GPUs by NVML.
"""

import os
import socket
from collections.abc import Sequence

from lorakit.distributed.launchers import LaunchedProcess
from lorakit.errors import UserError

# Type of device -> torch.distributed's backends for it (its `default_device_backend_map`; AMD's RCCL goes by NCCL's
# name). Two on an accelerator: what is in main memory goes by gloo.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
# Type of device -> variables by which a process sees some of the devices only; the first one that is set counts.
VISIBLE = {"cuda": ("CUDA_VISIBLE_DEVICES",), "xpu": ("ZE_AFFINITY_MASK",)}
# ROCm shows itself as cuda; its own variable counts more than CUDA's (torch's cuda/__init__.py).
_ROCM_VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def device_type() -> str:
    """The type of device that this torch computes on here, as torch names it."""
    import torch

    # Counted: `is_available` would start CUDA (torch's cuda/__init__.py).
    built_for = torch.accelerator.current_accelerator()
    return built_for.type if built_for and torch.get_device_module(built_for).device_count() else "cpu"


def count_devices() -> int:
    """The GPUs that torch can use here: 0 on a machine without."""
    import torch

    device = device_type()
    return 0 if device == "cpu" else int(torch.get_device_module(device).device_count())


def bind_device(place: LaunchedProcess, device: str) -> None:
    """Let this process see its own device alone, of this type. UserError where there are fewer than processes."""
    import torch

    if device == "cpu":
        return
    if device not in VISIBLE:
        raise UserError("a Mac has one GPU: start one process, without a launcher.")
    count = count_devices()
    variables = _ROCM_VISIBLE if torch.version.hip else VISIBLE[device]
    restricted = next((os.environ[name] for name in variables if os.environ.get(name)), "")
    if count == 1 and restricted and place.local_size > 1:
        return  # the launcher gave each process its own
    if count < place.local_size:
        raise UserError(
            f"{place.local_size} processes on {socket.gethostname()}, which shows {count} GPUs: a process needs one "
            "for itself. Start fewer."
        )
    names = restricted.split(",") if restricted else [str(index) for index in range(count)]
    os.environ[variables[0]] = names[place.local_rank].strip()


def identify_device(device: str) -> str:
    """The type of this process's device, its machine and the device itself, where one is told from another."""
    import torch

    number = "" if device == "cpu" else torch.get_device_module(device).get_device_properties(0).uuid
    return f"{device}\n{socket.gethostname()}\n{number}"


def refuse_unfit_devices(identities: Sequence[str]) -> None:
    """UserError where processes, by rank, compute on unlike devices, or two of them on one."""
    devices = [identity.split("\n") for identity in identities]
    for rank, (kind, host, number) in enumerate(devices):
        if kind != devices[0][0]:
            raise UserError(
                f"rank 0 on {devices[0][1]} computes on {devices[0][0]}, rank {rank} on {host} on {kind}: all take the "
                "same type of device. Is there a GPU, its driver and the same torch on each machine?"
            )
        if number and (first := devices.index([kind, host, number])) < rank:
            raise UserError(
                f"rank {first} and rank {rank} have the same GPU of {host} ({number}): a process needs one for itself. "
                "Start as many processes as there are GPUs; SLURM: --ntasks-per-node and --gpus-per-node alike."
            )
