"""What this machine is, found without loading torch, and what it reaches in training, as against the peaks that its
maker prints."""

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorakit.hardware.allocator import use_expandable_segments
from lorakit.hardware.cgroups import read_cgroup_limits, text_of
from lorakit.hardware.drivers import DriverGpu, hides_gpus, read_driver_gpus, read_other_gpus
from lorakit.hardware.gpus import Gpu, match_gpu
from lorakit.hardware.links import host_link
from lorakit.progress import Progress


@dataclass(frozen=True)
class Machine:
    """The device that a run uses. `memory` is the device's, in bytes: free RAM on a CPU, total memory on a GPU, and on
    a Mac what its GPU may take of the memory that it shares with the processor."""

    device: str  # as torch calls it: "cpu", "cuda" (NVIDIA's and AMD's), "xpu" (Intel's) or "mps" (Apple's)
    name: str
    memory: int
    bfloat16: bool
    here: bool = True  # whether it is the machine that this runs on, and not one that is planned for
    card: Gpu | None = None  # the card of the table that it is, whose rates are known

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def place(self) -> str:
        """Words for where its memory is."""
        return {"cpu": "free", "mps": "for the GPU"}.get(self.device, "on the card")


def has_own_memory(machine: Machine) -> bool:
    """Whether the device has memory beside the processor's."""
    return machine.device not in ("cpu", "mps")


@functools.cache
def this_machine() -> Machine:
    """The first visible GPU of a known size, NVIDIA's before those of others, else the processor."""
    if not hides_gpus():
        gpus, _ = read_driver_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0])
        if gpus and gpus[0].memory and gpus[0].capability[:1].isdigit():
            name, memory = gpus[0].name, gpus[0].memory
            return Machine("cuda", name, memory, float(gpus[0].capability) >= 8.0, card=match_gpu(name, memory))
    device, others = read_other_gpus()
    return machine_of(device, others[0]) if others and others[0].memory else processor()


def machine_of(device: str, gpu: DriverGpu) -> Machine:
    """A machine with a GPU of AMD's, Intel's or Apple's. All of them have bfloat16, if need be in software, as torch
    says of them (`is_bf16_supported` of torch.cuda and torch.xpu; transformers' `is_torch_bf16_gpu_available`)."""
    return Machine(device, gpu.name, gpu.memory, bfloat16=True, card=match_gpu(gpu.name, gpu.memory))


def machine_with(card: Gpu) -> Machine:
    """A machine with this card, to plan for."""
    known = card if card.float16 else None
    return Machine(card.device, card.name, card.memory, card.bfloat16 is not None, here=False, card=known)


def usable_machine(progress: Progress) -> Machine:
    """The device that torch can really use: a driver may show a GPU to a torch that was built without it, or hide one
    from us."""
    import torch

    from lorakit.hardware.accelerator import current_accelerator, gpu_of_torch

    seen, device = this_machine(), current_accelerator()
    if device == "cuda":
        use_expandable_segments()
    if device is None and seen.is_gpu:
        reason = f"this torch ({torch.__version__}) cannot use it"
        progress.warn(f"{seen.name} is here, but {reason}: running on the processor")
        return processor()
    if device is None or (device == seen.device and device != "mps"):
        return seen
    name, memory, bfloat16 = gpu_of_torch(device)
    name = seen.name if seen.device == device else name  # torch has no name for Apple's chips
    return Machine(device, name, memory, bfloat16, card=match_gpu(name, memory))


def processor() -> Machine:
    """This machine's processor, as the device of a run."""
    flags, name = proc_value("cpuinfo", "flags"), proc_value("cpuinfo", "model name")
    available, left = proc_value("meminfo", "MemAvailable"), read_cgroup_limits().memory_left
    free = int(available.split()[0]) << 10 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()  # oneDNN, which multiplies for torch, goes by it
    has_tiles = "amx_bf16" in flags.split() and ("AMX" in limit or limit in ("ALL", "DEFAULT"))
    return Machine("cpu", name or "CPU", free if left is None else min(free, left), has_tiles)


def proc_value(file: str, key: str) -> str:
    """What a file of /proc says first of something; empty where it says nothing."""
    line = re.search(rf"^{key}\s*:(.*)$", text_of(Path("/proc") / file), re.MULTILINE)
    return line[1].strip() if line else ""


# Shares of the dense peak that large matrix products reach, in a public table of torch's (docs/planning.md): A100 0.79
# to 0.85, H100 0.80, B200 0.75, V100S 0.68; where tensor cores are halved, as in GeForce cards from the 30 series on,
# 0.97 to 1.13, for they wait for nothing and clock higher than specified. A step's products are smaller: a little less.
_SHARE, _HALVED_SHARE = 0.7, 0.9
# AMD's: MI300X 0.50 to 0.54 and MI325X 0.61 to 0.65 at the sizes that suit them best (rocm.blogs.amd.com, Measuring
# Max-Achievable FLOPs, part 2); nothing was measured on one here.
_AMD_SHARE = 0.5
# Outside the tensor cores: RTX 3090 0.69, RTX 4090 0.66, A100 0.93 (the same table).
_FLOAT32_SHARE = 0.65
# Bfloat16 on a card without it runs at 0.5 to 0.75 of float32's speed (RTX 2080, P40, V100: the same table).
_EMULATED_SHARE = 0.55
# The share of the memory's bandwidth that long elementwise operations reach.
_BANDWIDTH_SHARE = 0.8
# Seconds that Python and torch take to start a kernel.
_START = 1e-5
# On a processor, products of a training step reach this share of a large square one, as numpy computes it.
_PROCESSOR_SHARE = 0.6


@dataclass(frozen=True)
class Throughput:
    """What a device reaches."""

    compute: float  # FLOP/s of matrix products
    bandwidth: float  # bytes a second, read and written
    words: str  # where these are from
    number_bytes: int = 2  # of the type in which activations are held
    start: float = _START  # seconds to start one kernel
    queued: bool = True  # whether kernels are started while others run: on a GPU
    link: float = 0.0  # bytes a second between main memory and a GPU, each way


def throughput_of(machine: Machine, dtype: str) -> Throughput | None:
    """What a machine reaches with a recipe's dtype; None where that is not known. A processor's speed is measured."""
    if machine.card:
        return gpu_throughput(machine.card, dtype)
    return measure_cpu() if not machine.is_gpu and dtype == "float32" else None


def gpu_throughput(device: Gpu, dtype: str) -> Throughput:
    """What a GPU reaches with a recipe's dtype: float32, bfloat16 or float16."""
    peak = device.bfloat16 if dtype == "bfloat16" else device.float16
    if dtype == "float32":
        share, peak, words = _FLOAT32_SHARE, device.float32, "float32"
    elif peak is None:
        share, peak, words = _EMULATED_SHARE, device.float32, "float32: the card has no bfloat16"
    else:  # halved tensor cores do twice what a card's other lanes do, whole ones four times and more
        share, words = _HALVED_SHARE if peak < 3 * device.float32 else _SHARE, dtype
    share = share if device.capability else _AMD_SHARE
    digits = 0 if peak >= 20e12 else 1
    compute = f"{share:.0%} of {peak / 1e12:,.{digits}f} TFLOP/s in {words}"
    words = f"{compute}, {_BANDWIDTH_SHARE:.0%} of {device.bandwidth / 1e9:,.0f} GB/s: {device.source}"
    number_bytes = 4 if dtype == "float32" else 2
    link = host_link(device).bandwidth
    return Throughput(share * peak, _BANDWIDTH_SHARE * device.bandwidth, words, number_bytes, link=link)


def cpu_throughput(measured_flops: float, bandwidth: float) -> Throughput:
    """What a processor reaches in float32, from its measured matrix speed and bandwidth."""
    words = f"{_PROCESSOR_SHARE:.0%} of {measured_flops / 1e9:.0f} GFLOP/s, measured"
    return Throughput(_PROCESSOR_SHARE * measured_flops, bandwidth, words, number_bytes=4, queued=False)


@functools.cache
def measure_cpu() -> Throughput:
    """This machine's float32 matrix speed and bandwidth, measured with numpy in under 0.3 s."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    # Large enough for every core, small enough to be done often: the fastest met no other work on this machine.
    square = np.ones((512, 512), dtype=np.float32)
    result = np.empty_like(square)
    least = _fastest(lambda: np.matmul(square, square, out=result), 0.1)
    with threadpool_limits(1):  # where other work holds the cores up, threads that wait for each other are slower
        least = min(least, _fastest(lambda: np.matmul(square, square, out=result), 0.05))
    flops = 2 * 512**3 / least
    # 4 MB: about what lies between two products of a step, of which a cache holds some.
    source = np.ones(1 << 20, dtype=np.float32)
    target = np.empty_like(source)
    bandwidth = 2 * source.nbytes / _fastest(lambda: np.copyto(target, source), 0.05)
    return cpu_throughput(flops, bandwidth)


def _fastest(call: Callable[[], object], limit: float) -> float:
    least, until = float("inf"), time.perf_counter() + limit
    while time.perf_counter() < until:
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least
