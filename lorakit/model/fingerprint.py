"""The fingerprint of a model in memory: two are equal only where the model computes the same, bit for bit."""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

# Numbers of 8 bytes that are weighed at once.
_BLOCK = 1 << 20


def fingerprint_of(model: Any) -> str:
    """A hash of every weight and buffer (their bits, sizes, types and devices), of which weights are one, of the
    modules with their hooks, and of the configurations.

    Weights are hashed on the device that they lie on, so that it takes about as long as reading them once.
    """
    digest = hashlib.sha256()
    for part in _structure(model):
        digest.update(json.dumps(part, default=str).encode())
    first: dict[Any, str] = {}
    for name, tensor in _tensors(model):
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        shared = first.setdefault(place, name) if tensor.numel() else name
        content = [shared] if shared != name else content_of(tensor)
        digest.update(json.dumps([name, str(tensor.dtype), str(tensor.device), tensor.shape, content]).encode())
    return digest.hexdigest()


def _structure(model: Any) -> Iterator[Any]:
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        replaced = "forward" in vars(module)
        yield [name, type(module).__qualname__, module.training, *map(len, hooks), replaced]
    yield [config.to_dict() for config in (model.config, model.generation_config) if config is not None]


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and what quantized layers keep besides (their state dict has it)."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            yield f"state.{name}", value


def content_of(tensor: torch.Tensor) -> list[int]:
    """For each block of a tensor the sum of its bits times odd numbers, modulo 2^64: no change of one number, and of
    several almost none, leaves it as it was."""
    if not tensor.numel() or tensor.is_meta:
        return []
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole = flat.numel() // 8 * 8
    pieces = flat[:whole].view(torch.int64).split(_BLOCK) if whole else ()
    factors = _factors(flat.device)
    sums = [(piece * factors[: len(piece)]).sum() for piece in pieces]
    return [*(torch.stack(sums).tolist() if sums else []), *flat[whole:].tolist()]


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    random = torch.randint(-(2**62), 2**62, (_BLOCK,), generator=torch.Generator().manual_seed(0))
    return random.to(device) * 2 + 1
