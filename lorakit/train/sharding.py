"""What the processes of a training share out of the model: the strategies of `train.sharding`, a table of functions.

Rows, loss, checkpoints and the result are the same in all of them. The trainer asks its strategy in the few places
where the processes no longer hold all that they train, or wait for each other inside a pass:

- before the model is loaded, on which device (`loading_device`); once its adapter is attached, to leave to each
  process its part (`shard`); from then on every pass goes through the function that this gave;
- around passes, how a failure of one process becomes one of all (`attempt`), and whether all have to make the same
  number of them (`is_collective`);
- for a checkpoint and the result, to bring together what is shared out (`whole`), and after one, to take a part of it
  again (`part_of`): files hold whole tensors, whatever wrote them, so that any strategy goes on from any other's.

What a process holds a part of is trained there too: its gradient is the sum over all processes already when a backward
pass ends, and the optimizer's states have its shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from lorakit.distributed.processes import announced, is_first, together, world_size
from lorakit.recipe.schema import Train

Pass = Callable[..., Any]
"""Calls a function with arguments: the forward computation of one pass."""


def plain_pass(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The function's result: of a model that is held whole."""
    return function(*arguments, **named)


@dataclass(frozen=True)
class Sharding:
    """A strategy. As it stands here every process holds the whole model, as in data parallel or alone."""

    is_collective: bool = False
    """Whether processes wait for each other inside a pass: all make the same number of them, and after an error on one
    the others cannot try again."""
    attempt: Callable[[Callable[[], Any]], Any] = together
    """Runs passes such that none goes on where they failed on another."""
    loading_device: Callable[[str], str] = lambda device: device
    """The device on which the base is loaded and the adapter attached, for a device that trains."""
    shard: Callable[[Any, torch.device], Pass] = lambda model, device: plain_pass
    """Leaves to this process its part of a model, on its device; what it returns, every pass runs through."""
    local: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    """This process's part of a tensor that is shared out; of others the tensor itself."""
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    """The whole of a tensor that is shared out. All processes call it, for the same tensors in the same order."""
    part_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda tensor, like: tensor
    """A whole tensor, held as `like` is; nothing is sent."""
    put: Callable[[Any, torch.Tensor], Any] = lambda parameter, tensor: parameter.data.copy_(tensor)
    """Gives a parameter the numbers of a whole tensor; nothing is sent."""
    share_optimizer: Callable[[Any, Pass, float, bool], Any] | None = None
    """Makes of an optimizer one that shares out its states: from the function that every pass runs through, the norm
    to which gradients are clipped, and whether ranks move. It has `backward` and `norm`: it adds up the gradients of
    all processes in each backward pass, and clips them, so that no weight has a gradient of its own."""
    close: Callable[[Pass], None] = lambda run: None
    """Called when the training has ended."""

    def is_shared_out(self, tensor: torch.Tensor) -> bool:
        """Whether this process holds a part of a tensor only."""
        return self.local(tensor) is not tensor

    @torch.no_grad()
    def whole_on_first(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors by name, those that were shared out in main memory, one that has two names once; empty on other
        processes than the first. All call it."""
        made: dict[int, torch.Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in made:
                whole = self.whole(tensor)
                made[id(tensor)] = whole.cpu() if is_first() and whole is not tensor else tensor
        return {name: made[id(tensor)].detach() for name, tensor in tensors.items()} if is_first() else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state dict of an optimizer, with whole tensors, on the first process. All call it."""
        state = optimizer.state_dict()
        parts = {index: self.whole_on_first(_tensors(values)) for index, values in state["state"].items()}
        return state | {"state": {index: values | parts[index] for index, values in state["state"].items()}}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Go on from a state dict with whole tensors."""
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parts = {}
        for number, parameter in zip(numbers, order, strict=True):
            values = state["state"].get(number, {})
            alike = {name: value for name, value in _tensors(values).items() if value.shape == parameter.shape}
            parts[number] = values | {name: self.part_of(value, parameter) for name, value in alike.items()}
        optimizer.load_state_dict(state | {"state": parts})


def _tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _later(name: str) -> Callable[..., Any]:
    """A function such as `model.fsdp.shard`, imported when it is called: it brings much of torch, or DeepSpeed."""
    module, _, function = name.rpartition(".")
    return lambda *given: getattr(import_module(f"lorakit.{module}"), function)(*given)


WHOLE = Sharding()
"""Data parallel, or one process alone."""

SHARDINGS = {
    "none": WHOLE,
    "fsdp": Sharding(
        is_collective=True,
        attempt=announced,
        # Block by block it then goes to the device, which need not have room for the whole.
        loading_device=lambda device: "cpu",
        shard=_later("model.fsdp.shard"),
        local=_later("model.fsdp.local"),
        whole=_later("model.fsdp.whole"),
        part_of=_later("model.fsdp.part_of"),
        put=_later("model.fsdp.put"),
    ),
    "zero-2": Sharding(
        is_collective=True,
        attempt=announced,
        shard=_later("train.zero.replicate"),
        put=_later("train.zero.put"),
        share_optimizer=_later("train.zero.ZeroOptimizer"),
        close=_later("train.zero.close"),
    ),
    "zero-3": Sharding(
        is_collective=True,
        attempt=announced,
        loading_device=lambda device: "cpu",
        shard=_later("train.zero.shard"),
        local=_later("train.zero.local"),
        whole=_later("train.zero.whole"),
        put=_later("train.zero.put"),
        share_optimizer=_later("train.zero.ZeroOptimizer"),
        close=_later("train.zero.close"),
    ),
}


def sharding_of(train: Train) -> Sharding:
    """The strategy of a training; alone, a process holds everything."""
    return SHARDINGS[train.sharding] if world_size() > 1 else WHOLE
