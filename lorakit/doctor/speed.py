"""How fast a device multiplies matrices, in each number format."""

import functools
import time
from typing import Any

_SIZES = (128, 256, 512, 1024, 2048, 4096)
# A product that takes this long is not drowned by the call itself; in a number format that the processor has no
# instructions for, a small one does already.
_LONG_ENOUGH = 0.02
_SECONDS = 0.2


@functools.cache
def product_speed(device: str, dtype: str) -> tuple[float, int]:
    """FLOP/s of a square matrix product, and the width at which it was reached.

    Sizes grow until a product takes 20 ms; that size is then repeated for 0.2 s, and the fastest counts.

    Raises:
        RuntimeError: the device cannot do it.
    """
    for size in _SIZES:
        seconds, (left, right) = 0.0, _matrices(device, dtype, size)
        _once(left, right, device)  # the first one pays for what is set up
        seconds = _once(left, right, device)
        if seconds >= _LONG_ENOUGH:
            break
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        seconds = min(seconds, _once(left, right, device))
    return 2 * size**3 / seconds, size


def _matrices(device: str, dtype: str, size: int) -> tuple[Any, Any]:
    import torch

    left, right = torch.rand(2, size, size).to(device, getattr(torch, dtype))
    return left, right


def _once(left: Any, right: Any, device: str) -> float:
    import torch

    begun = time.perf_counter()
    with torch.inference_mode():
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begun
