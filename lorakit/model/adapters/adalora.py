"""AdaLoRA (Zhang et al., arXiv 2303.10512): every module starts with more directions than the budget pays for, and
those that matter least are taken away while it trains.

The schedule, the importance and the choice are the paper's, as in PEFT's RankAllocator, which is not used: it keeps a
third copy of every weight, takes away more than it should where importances are equal, fails where nothing is to be
taken away or no step came before the choice, and its masks travel through lists of Python numbers at every step.
"""

from typing import Any

import torch
from torch import Tensor

from lorakit.model.adapters import AdaLora
from lorakit.model.adapters.svd import change_steps, orthogonality, svd_modules


class AdaLoraScheduler:
    """The RankScheduler of an AdaLoRA training: from the sum of initial ranks down to `rank` times the modules. Until
    the last choice a direction taken away may come back, as in the paper; from then on it stays away."""

    def __init__(self, model: Any, settings: AdaLora, steps: int) -> None:
        self._settings, self._modules = settings, svd_modules(model)
        self._changes = change_steps(settings.shrink_from, settings.shrink_to, settings.every, steps)
        self.settled_at = self._changes.start
        config = model.peft_config["default"]
        self._most, self._least = (rank * len(self._modules) for rank in (config.init_r, config.target_r))
        self._parameters = [part for module in self._modules for part in (module.a, module.e, module.b)]
        self._names = [f"{module.path}.{part}" for module in self._modules for part in ("lora_A", "lora_E", "lora_B")]
        self._importance = [torch.zeros_like(part) for part in self._parameters]
        self._uncertainty = [torch.zeros_like(part) for part in self._parameters]
        self._masks: list[Tensor] = []  # of the last choice: (rank, 1) a module, 1 where a direction stays

    def penalty(self) -> Tensor:
        return self._settings.orthogonality * orthogonality(self._modules)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Any) -> None:
        """Note the gradients, and take directions away when it is time."""
        if step > self.settled_at:
            self._mask()  # the optimizer's moments have moved what was taken away
            return
        self._update_importance()
        if step in self._changes:
            done = (step - self._changes.stop) / (self.settled_at - self._changes.stop)
            budget = self._least + round((self._most - self._least) * (1 - done) ** 3)  # the paper's cubic schedule
            self._masks = self._most_important(budget)
            self._mask()
        if step == self.settled_at:
            self._importance, self._uncertainty = [], []

    def state(self) -> dict[str, Tensor]:
        """The averages while directions are still chosen, then what was chosen."""
        if not self._importance:
            return {f"{module.path}.kept": mask for module, mask in zip(self._modules, self._masks, strict=True)}
        return {
            f"{name}.{kind}": tensor
            for kind, tensors in (("importance", self._importance), ("uncertainty", self._uncertainty))
            for name, tensor in zip(self._names, tensors, strict=True)
        }

    def restore(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Go on from the averages or the last choice; shapes never change."""
        if f"{self._modules[0].path}.kept" in state:
            self._masks = [state[f"{module.path}.kept"].to(module.e) for module in self._modules]
            self._importance, self._uncertainty = [], []
        else:
            named = list(zip(self._names, self._parameters, strict=True))
            self._importance = [state[f"{name}.importance"].to(like) for name, like in named]
            self._uncertainty = [state[f"{name}.uncertainty"].to(like) for name, like in named]

    def _update_importance(self) -> None:
        """Moving averages of |weight * gradient|, the loss that a weight accounts for, and of how much that varies."""
        gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in self._parameters]
        if not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            return  # float16 overflowed, and the optimizer skipped the step too
        now = torch._foreach_mul(self._parameters, gradients)
        torch._foreach_abs_(now)
        fresh = 1 - self._settings.smoothing
        torch._foreach_lerp_(self._importance, now, fresh)
        torch._foreach_sub_(now, self._importance)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self._uncertainty, now, fresh)

    def _most_important(self, budget: int) -> list[Tensor]:
        """The masks that keep the `budget` most important directions; of equal ones the first."""
        scores = torch._foreach_mul(self._importance, self._uncertainty)
        triples = zip(scores[::3], scores[1::3], scores[2::3], strict=True)
        by_module = [a.mean(1) + e.flatten() + b.mean(0) for a, e, b in triples]
        ranks = [len(scores) for scores in by_module]
        order = torch.cat(by_module).argsort(descending=True, stable=True)
        mask = torch.zeros(len(order), device=order.device, dtype=scores[0].dtype)
        mask[order[:budget]] = 1
        return [part[:, None].clone() for part in mask.split(ranks)]

    def _mask(self) -> None:
        torch._foreach_mul_([module.e for module in self._modules], self._masks)
