"""Several equal devices that train together, and those of this machine."""

import os
from dataclasses import dataclass, replace

from lorakit.hardware.drivers import DriverGpu, hides_gpus, read_driver_gpus, read_other_gpus
from lorakit.hardware.links import Link, default_link
from lorakit.hardware.machine import Machine, this_machine


@dataclass(frozen=True)
class Devices:
    """So many devices, alike, and what joins them; one has nothing to be joined by."""

    count: int = 1
    link: Link | None = None


ONE_DEVICE = Devices()


def devices_of(machine: Machine, count: int, link: Link | None = None) -> Devices:
    """So many of a machine's device, joined by `link`, or by what usually joins them."""
    return Devices(count, link or default_link(machine.card, machine.is_gpu) if count > 1 else None)


def visible_gpus() -> list[DriverGpu]:
    """The GPUs that a driver shows and the environment does not hide, NVIDIA's before those of others."""
    nvidia = [] if hides_gpus() else read_driver_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", ""))[0]
    return nvidia or read_other_gpus()[1]


def device_here(count: int) -> Machine:
    """This machine's device as each of `count` processes has it: the GPU with the least memory, or its part of a
    processor's free memory."""
    machine = this_machine()
    if not machine.is_gpu:
        return replace(machine, memory=machine.memory // count)
    gpus = visible_gpus()[:count]
    return replace(machine, memory=min([gpu.memory for gpu in gpus if gpu.memory], default=machine.memory))
