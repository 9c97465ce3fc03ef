"""Activations that wait in main memory between the forward and the backward pass: `train.offload_activations`.

TRL's `OffloadActivations` (trl/models/activation_offloading.py) sends them, on a stream of its own beside the
computation: few are still on the card when it has gone on, and in the backward pass few are back before they are used.
Here it is put around the model's body alone: the loss head keeps little, and is the first that the backward pass needs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from trl.models.activation_offloading import OffloadActivations

from lorakit.model.loss import body_of, causal_of

# Bytes: a smaller tensor stays where it is.
_LEAST = 1 << 20
# Tensors that may still be on their way to main memory; the library's own default.
_ON_THEIR_WAY = 5

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class _Copy:
    """A tensor that operations of a forward pass have saved so many times."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.uses = handle, 1
        self.restored: Tensor | None = None


def keep_once(keep: Pack, restore: Unpack) -> tuple[Pack, Unpack]:
    """The same hooks, of which `keep` gets a tensor once however many operations save it, and `restore` its handle once
    for all of them: queries, keys and values of a block have one input. That two are the same is known of the last few
    tensors, which are held meanwhile, so that no other one takes their place."""
    recent: dict[tuple[Any, ...], tuple[_Copy, Tensor]] = {}

    def pack(tensor: Tensor) -> _Copy:
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
        if key in recent:
            copy, _ = recent[key]
            copy.uses += 1
            return copy
        if len(recent) == _ON_THEIR_WAY:
            del recent[next(iter(recent))]
        copy = _Copy(keep(tensor))
        recent[key] = copy, tensor
        return copy

    def unpack(copy: _Copy) -> Tensor:
        recent.clear()
        tensor = restore(copy.handle) if copy.restored is None else copy.restored
        copy.uses -= 1
        copy.restored = tensor if copy.uses else None
        if copy.uses and tensor.device.type != "cpu":  # the library lets go of it after its first use
            tensor.record_stream(torch.accelerator.current_stream())
        return tensor

    return pack, unpack


def library_hooks(storages: set[int]) -> tuple[Pack, Unpack]:
    """The hooks of TRL's class for one forward pass and its backward. `storages`: of the weights, which stay on the
    card. The class itself is not entered: that would wait for the card, and give back all its spare memory."""
    offload = OffloadActivations(min_offload_size=_LEAST, max_fwd_stash_size=_ON_THEIR_WAY)
    offload.param_storages = storages

    def keep(tensor: Tensor) -> Any:
        offload.storage_to_tensor_id.clear()  # it would leave on the card what it has sent already
        return offload.pack_hook(tensor)

    return keep_once(keep, offload.unpack_hook)


@contextmanager
def offload_activations(model: Any, on: bool) -> Iterator[None]:
    """Within this, where it is on, what the model's body keeps for its backward pass waits in main memory."""
    if not on:
        yield
        return
    body, storages = body_of(causal_of(model)), {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    replaced, forward = body.__dict__.get("forward"), body.forward

    def offloading(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        with saved_tensors_hooks(*library_hooks(storages)):
            return forward(*arguments, **named)

    body.forward = offloading
    try:
        yield
    finally:
        if replaced is None:
            del body.forward
        else:
            body.forward = replaced
