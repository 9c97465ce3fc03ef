"""FlexLoRA (Liu et al., arXiv 2601.22905): ranks move from modules of low entropy to those of high, while it trains.

Experimental. Five faults of the published code are fixed: the direction that a module gives up is the one with the
smallest |E|, not the smallest E; the entropy is defined where E is 0 and at rank 1; new directions are drawn at the
scale of the first ones, not 50 times larger; the optimizer keeps its moments of the directions that stay; and the
parameters stay the objects that the optimizer knows, so that moved ranks go on being trained.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import UserError
from lorakit.model.adapters import FlexLora
from lorakit.model.adapters.svd import SvdModule, change_steps, orthogonality, svd_modules

_STANDARD_DEVIATION = 0.02  # of A and B at the start: peft/tuners/adalora/layer.py


class FlexLoraScheduler:
    """The RankScheduler of a FlexLoRA training: the sum of all ranks stays what it is. A module's scale stays the one
    it started with, alpha / its first rank: it would jump at every move, and with it all that the kept directions add.
    UserError where there is one module only, so nothing could move."""

    settled_at = 0

    def __init__(self, model: Any, settings: FlexLora, steps: int) -> None:
        self._model, self._settings, self._modules = model, settings, svd_modules(model)
        if len(self._modules) < 2:
            reason = "flexlora moves ranks between modules, and one is chosen"
            raise UserError(f"adapter.targets: {reason}. Choose more, or write adapter.kind: lora.")
        self._changes = change_steps(settings.move_from, settings.move_to, settings.every, steps)
        self._generator = torch.Generator()  # the global one belongs to dropout
        self._generator.manual_seed(torch.initial_seed() + 1)  # the first directions were drawn from the seed itself

    def penalty(self) -> Tensor:
        return self._settings.orthogonality * orthogonality(self._modules)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Any) -> None:
        """Move ranks when it is time, in the parameters and in the optimizer's moments."""
        if step in self._changes:
            givers, takers = self._givers_and_takers()
            for module in givers:
                _drop(module, optimizer)
            for module in takers:
                _add(module, optimizer, self._generator)

    def state(self) -> dict[str, Tensor]:
        """Where the random numbers of new directions stand."""
        return {"generator": self._generator.get_state()}

    def restore(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Go on with the random numbers, and give every parameter its shape and values in `weights`."""
        self._generator.set_state(state["generator"].cpu())
        for name, parameter in self._model.named_parameters():
            if name in weights and weights[name].shape != parameter.shape:
                _reshape(parameter, weights[name].to(parameter, copy=True))
        for module in self._modules:
            module.layer.r["default"] = len(module.e)

    def _givers_and_takers(self) -> tuple[list[SvdModule], list[SvdModule]]:
        """As many modules that give a direction up as get one; no module is both, and none gets beyond full rank."""
        order = torch.stack([entropy(module.e) for module in self._modules]).argsort(stable=True).tolist()
        ascending = [self._modules[index] for index in order]
        moved = min(self._settings.moved, len(ascending) // 2)
        givers = [module for module in ascending if len(module.e) > 1][:moved]
        paths = {module.path for module in givers}
        others = [module for module in reversed(ascending) if module.path not in paths]
        takers = [module for module in others if len(module.e) < min(module.a.shape[1], module.b.shape[0])]
        count = min(len(givers), len(takers), moved)
        return givers[:count], takers[:count]


def entropy(e: Tensor) -> Tensor:
    """How evenly a module uses its directions, from 0 to 1: the entropy of their shares of the sum of E^2. Where E is
    0, and at rank 1, it is 0: a module that uses no direction needs none, and one direction has no spread."""
    energy = e.flatten().double().square()
    shares = energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum() / max(math.log(len(shares)), math.log(2))


def _drop(module: SvdModule, optimizer: Any) -> None:
    rank = len(module.e)
    stay = (torch.arange(rank, device=module.e.device) != module.e.abs().argmin()).nonzero().flatten()
    for parameter, axis in ((module.a, 0), (module.e, 0), (module.b, 1)):
        for name, moment in _moments(optimizer, parameter).items():
            optimizer.state[parameter][name] = moment.index_select(axis, stay)
        _reshape(parameter, parameter.data.index_select(axis, stay))
    module.layer.r["default"] = rank - 1


def _add(module: SvdModule, optimizer: Any, generator: torch.Generator) -> None:
    """Give a module one direction more, drawn as its first ones were; its E is 0, so that nothing changes yet. Adam
    counts steps by tensor, so its bias correction is past for the new direction, and a second moment of 0 would make
    its first steps 3 to 6 times too long: it starts from the mean of the others. The first moment starts at 0."""
    for parameter, axis in ((module.a, 0), (module.e, 0), (module.b, 1)):
        drawn = torch.empty(*parameter.shape[:axis], 1, *parameter.shape[axis + 1 :])
        drawn = drawn.zero_() if parameter is module.e else drawn.normal_(0, _STANDARD_DEVIATION, generator=generator)
        for name, moment in _moments(optimizer, parameter).items():
            fresh = moment.mean(axis, keepdim=True)
            fresh = torch.zeros_like(fresh) if name == "exp_avg" else fresh
            optimizer.state[parameter][name] = torch.cat([moment, fresh], axis)
        _reshape(parameter, torch.cat([parameter.data, drawn.to(parameter)], axis))
    module.layer.r["default"] = len(module.e)


def _moments(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """What torch's AdamW keeps for each number of a parameter; nothing where it never had a gradient."""
    state = optimizer.state.get(parameter, {})
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}


def _reshape(parameter: Tensor, data: Tensor) -> None:
    """Put a tensor of another shape into a parameter, which stays the object that the optimizer knows."""
    parameter.grad = None
    # While the graph of the last step lives, autograd expects gradients of the old shape; another type makes it forget.
    other = torch.float64 if data.dtype == torch.float32 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
