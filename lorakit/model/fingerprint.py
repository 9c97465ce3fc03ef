"""The fingerprint of a model in memory."""

import functools
import hashlib
import json
from typing import Any

import torch

_BLOCK = 1 << 20  # numbers of 8 bytes that are hashed at once


def fingerprint_of(model: Any) -> str:
    """A hash that is equal only where a model computes the same, bit for bit.

    It covers every weight and buffer, which weights are tied, the modules with their hooks, and the configurations.
    Weights are hashed on their device, which takes about as long as reading them once.
    """
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(json.dumps(part, default=str).encode())

    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        add([name, type(module).__qualname__, module.training, *hooks, "forward" in vars(module)])
    add([config.to_dict() for config in (model.config, model.generation_config) if config is not None])
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in model.state_dict().items():  # has what quantized layers keep besides
        if isinstance(value, torch.Tensor):
            tensors.append((f"state.{name}", value))
    first: dict[Any, str] = {}
    for name, tensor in tensors:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        shared = first.setdefault(place, name) if tensor.numel() else name
        content = [shared] if shared != name else content_of(tensor)
        add([name, str(tensor.dtype), str(tensor.device), tensor.shape, content])
    return digest.hexdigest()


def content_of(tensor: torch.Tensor) -> list[int]:
    """For each block of a tensor the sum of its bits times odd numbers, modulo 2^64: a change of one number always
    changes it, and a change of several almost always."""
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
