"""FSDP2: every process holds a part of the weights, and gathers those of a block while it computes the block.

torch's `fully_shard` does it, called directly. Sharded is the frozen base; all that belongs to an adapter stays whole
on every process, so that its gradients, its optimizer and its checkpoints are those of data parallel. Where the weights
themselves are trained they are sharded with their gradients, which are added up, and the optimizer's states.

The units that are gathered are transformers' own (`_no_split_modules`: the blocks); embedding, head and what else is
outside of them are one more, gathered for the whole pass. Every process so has to make the same passes: its hooks wait
for the others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lorakit.distributed.processes import refuse, world_size
from lorakit.errors import UserError
from lorakit.model.loss import causal_of

Pass = Callable[..., Any]
"""Calls a function with arguments; all that a model computes in one pass happens within one such call."""


class Root(nn.Module):
    """The model and the passes over it: hooks on it gather what no block holds, once around a pass, however
    often the function calls the model's body or its head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)


def shard(model: Any, device: torch.device) -> Pass:
    """Leave to this process its part of the base's weights, on `device`, block by block, and give the function through
    which every pass over the model must run from now on. All processes call it. UserError where the model cannot be
    sharded."""
    causal = causal_of(model)
    _refuse_buffers(causal)
    mesh = init_device_mesh(device.type, (world_size(),))
    whole = adapter_parameters(model)
    states = {layer: _detach_state(layer) for layer in model.modules() if isinstance(layer, (Linear4bit, Linear8bitLt))}
    root: Any = Root(model)
    units = [*_blocks(causal), root]
    for unit in units:
        own = [layer for layer in unit.modules() if layer in states]
        fully_shard(unit, mesh=mesh, ignored_params=whole)
        unit.register_forward_pre_hook(partial(_attach_states, {layer: states.pop(layer) for layer in own}))
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    if model is causal:
        for unit in units:
            _add_up_gradients(unit)

    def run(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        result = root(function, *arguments, **named)
        parts = result if isinstance(result, tuple) else (result,)
        if not any(isinstance(part, torch.Tensor) and part.requires_grad for part in parts):
            root.reshard()  # there is no backward pass that would
        return result

    return run


def _blocks(causal: Any) -> list[Any]:
    """The modules that are gathered as one each, inner ones first."""
    names = set(causal._no_split_modules or ())
    blocks = [module for module in causal.modules() if type(module).__name__ in names]
    if not blocks:
        name = type(causal).__name__
        reason = f"transformers names no blocks of {name} that fsdp could gather one by one"
        refuse(UserError(f"train.sharding: {reason}. Write none."))
    return blocks[::-1]


def _refuse_buffers(causal: Any) -> None:
    if any(hasattr(module, "qweight") for module in causal.modules()):
        reason = "the weights of GPTQ and AWQ checkpoints are buffers, which fsdp does not share out"
        refuse(UserError(f"train.sharding: {reason}. Write none."))


def adapter_parameters(model: Any) -> set[Any]:
    """All parameters of an adapter, those that are not trained too; none where the weights themselves are trained."""
    if not hasattr(model, "peft_config"):
        return set()
    own = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            own |= {parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")}
    return own


def _add_up_gradients(unit: Any) -> None:
    """By default FSDP takes their mean over processes; the loss of each is divided by the whole step's tokens."""
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that scales
    unit.set_reduce_scatter_unused_params(True)  # the head, on a process whose rows train nothing


def _detach_state(layer: Any) -> dict[str, Any]:
    """What bitsandbytes keeps on a quantized weight besides its numbers. A second reference to them goes: it would
    hold the whole weight."""
    weight = layer.weight
    if isinstance(layer, Linear4bit):
        return dict(vars(weight))
    layer.state.SCB = weight.SCB if layer.state.SCB is None else layer.state.SCB
    layer.state.CB = weight.CB = weight.SCB = None
    return dict(vars(weight))


def _attach_states(states: dict[Any, dict[str, Any]], *_: Any) -> None:
    """Make the gathered weights of a unit bitsandbytes' own again, once: FSDP fills the same tensors in every pass."""
    for layer, state in states.items():
        weight = layer.weight
        if isinstance(weight, (Params4bit, Int8Params)):
            continue
        weight.__class__ = Params4bit if isinstance(layer, Linear4bit) else Int8Params
        vars(weight).update(state)
        if isinstance(layer, Linear8bitLt):
            layer.state.CB, layer.state.SCB = weight.data, layer.state.SCB.to(weight.device)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; itself where all hold it whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is held in parts; itself where all hold it whole. All processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is held: as this process's part of it, or whole. Nothing is sent."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def put(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
    """Give a parameter the numbers of a whole tensor, or of its part of them."""
    parameter.data.copy_(part_of(tensor, parameter))
