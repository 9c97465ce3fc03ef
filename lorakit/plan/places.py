"""What a run is planned for: a card from the table, or this machine, with the rates that it reaches."""

from lorakit.hardware.gpus import Gpu
from lorakit.hardware.machine import Machine, this_machine
from lorakit.hardware.throughput import Throughput, gpu_throughput, measure_cpu
from lorakit.plan.estimate import PlanDevice


def place_of(device: Gpu) -> PlanDevice:
    """A card that is not asked whether it is here."""
    machine = Machine("cuda", device.name, device.memory, device.bfloat16 is not None, here=False, card=device)
    return PlanDevice(machine, lambda dtype: gpu_throughput(device, dtype))


def this_place() -> PlanDevice:
    """This machine: its GPU where it has one that is known, else its processor, whose speed is measured."""
    machine = this_machine()
    if not machine.is_gpu:
        return PlanDevice(machine, _of_processor)
    card = machine.card
    return PlanDevice(machine, (lambda dtype: gpu_throughput(card, dtype)) if card else _unknown)


def _of_processor(dtype: str) -> Throughput | None:
    return measure_cpu() if dtype == "float32" else None


def _unknown(dtype: str) -> Throughput | None:
    return None
