"""What a device reaches in training, as against the peaks that its maker prints."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from lorakit.hardware.gpus import Gpu
from lorakit.hardware.machine import Machine

# Shares of the dense peak that large matrix products reach, in a public table of torch's (docs/planning.md): A100 0.79
# to 0.85, H100 0.80, B200 0.75, V100S 0.68; where tensor cores are halved, as in GeForce cards from the 30 series on,
# 0.97 to 1.13, for they wait for nothing and clock higher than specified. A step's products are smaller: a little less.
_SHARE, _HALVED_SHARE = 0.7, 0.9
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
    digits = 0 if peak >= 20e12 else 1
    compute = f"{share:.0%} of {peak / 1e12:,.{digits}f} TFLOP/s in {words}"
    words = f"{compute}, {_BANDWIDTH_SHARE:.0%} of {device.bandwidth / 1e9:,.0f} GB/s: {device.source}"
    number_bytes = 4 if dtype == "float32" else 2
    return Throughput(share * peak, _BANDWIDTH_SHARE * device.bandwidth, words, number_bytes)


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
