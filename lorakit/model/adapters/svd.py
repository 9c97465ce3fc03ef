"""Adapters held as B diag(E) A, in PEFT's AdaLoRA layers: adalora and flexlora.

Such a layer adds `alpha / ranknum * B (E * A) x` to its base, with A (rank, in), E (rank, 1) and B (out, rank). A
direction is one row of A with its number in E and its column of B.

AdaLoRA (Zhang et al., arXiv 2303.10512): every module starts with more directions than the budget pays for, and those
that matter least are taken away while it trains. The schedule, the importance and the choice are the paper's, as in
PEFT's RankAllocator, which is not used: it keeps a third copy of every weight, takes away more than it should where
importances are equal, fails where nothing is to be taken away or no step came before the choice, and its masks travel
through lists of Python numbers at every step.

FlexLoRA (Liu et al., arXiv 2601.22905), experimental: ranks move from modules of low entropy to those of high. Five
faults of the published code are fixed: the direction that a module gives up is the one with the smallest |E|, not the
smallest E; the entropy is defined where E is 0 and at rank 1; new directions are drawn at the scale of the first ones,
not 50 times larger; the optimizer keeps its moments of the directions that stay; and the parameters stay the objects
that the optimizer knows, so that moved ranks go on being trained.
"""

import math
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from lorakit.errors import UserError
from lorakit.hardware.accelerator import in_float64
from lorakit.model.adapters import AdaLora, FlexLora
from lorakit.model.adapters.weight_init import PREFIX, lora_layers


class SvdModule(NamedTuple):
    """An adapted module: its path in the base model, PEFT's layer, and a (rank, in), e (rank, 1) and b (out, rank)."""

    path: str
    layer: Any
    a: Tensor
    e: Tensor
    b: Tensor


def svd_modules(model: Any) -> list[SvdModule]:
    """The adapted modules of a PEFT model, in its order."""
    return [
        SvdModule(path, layer, layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"])
        for path, layer in lora_layers(model)
    ]


def change_steps(begin: float, end: float, every: int, steps: int) -> range:
    """The steps after which ranks change, the last one first: that at the share `end` of the run, whatever its length,
    and every so many steps before it, down to (without) that at the share `begin`."""
    last = math.ceil(end * steps)
    return range(last, min(math.floor(begin * steps), last - 1), -every)


def ranks_in_words(model: Any) -> str:
    """The ranks that a training ended with: directions whose E is not 0."""
    ranks = [int((module.e != 0).sum()) for module in svd_modules(model)]
    return f"ranks from {min(ranks)} to {max(ranks)} over {len(ranks)} modules, {sum(ranks):,} in all"


def orthogonality(modules: list[SvdModule]) -> Tensor:
    """How far from orthonormal: mean over A and B of |A A^T - I| and |B^T B - I| (Frobenius), as published."""
    wide, tall = [module.a for module in modules], [module.b for module in modules]
    with torch.autocast(wide[0].device.type, enabled=False):
        return _FromOrthonormal.apply(*wide, *tall)


class _FromOrthonormal(torch.autograd.Function):
    """With its gradient, 2 (A A^T - I) A / |A A^T - I|: autograd's, by both factors, takes twice as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, *matrices: Tensor) -> Tensor:
        half = len(matrices) // 2
        excess = [a @ a.T for a in matrices[:half]] + [b.T @ b for b in matrices[half:]]
        torch._foreach_sub_([some.diagonal() for some in excess], 1.0)
        norms = torch._foreach_norm(excess)
        torch._foreach_div_(excess, torch._foreach_clamp_min(norms, torch.finfo(norms[0].dtype).tiny))
        ctx.save_for_backward(*matrices, *excess)
        return torch.stack(norms).mean()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, ...]:
        count = len(ctx.saved_tensors) // 2
        matrices, excess = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        pairs = list(zip(matrices, torch._foreach_mul(excess, scale * 2 / count), strict=True))
        return (*(some @ a for a, some in pairs[: count // 2]), *(b @ some for b, some in pairs[count // 2 :]))


TRAINED_BESIDE = ("modules_to_save", "ensure_weight_tying", "trainable_token_indices")
"""Keys of PEFT's configurations for what is trained beside the low-rank matrices."""


def svd_to_lora(model: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The same function as one plain LoRA: its configuration, and its weights by their names in a PEFT adapter file.

    Directions whose E is 0 are left out. E and the scale are folded into B, so alpha equals the rank in every module:
    programs that do not read alpha_pattern scale it rightly too. A module without a direction left keeps one with
    B = 0, as a fresh LoRA has it: PEFT takes no rank of 0.
    """
    modules, trained = svd_modules(model), model.peft_config["default"]
    weights = {
        name: tensor.detach().clone()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        if not name.endswith((".lora_A", ".lora_B", ".lora_E"))
    }
    ranks = {}
    for module in modules:
        used = module.e.detach().flatten() != 0
        rows = used.nonzero().flatten() if used.any() else torch.zeros(1, dtype=torch.long, device=used.device)
        ranks[module.path] = len(rows)
        # PEFT divides by the rank that the module began with, and so it stays.
        scale = module.layer.scaling["default"] / (module.layer.ranknum["default"].item() + 1e-5)
        weights[f"{PREFIX}{module.path}.lora_A.weight"] = module.a.detach()[rows]
        weights[f"{PREFIX}{module.path}.lora_B.weight"] = (module.b * module.e.T * scale).detach()[:, rows]
    largest = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != largest}
    names = ("lora_dropout", "fan_in_fan_out", "task_type", *TRAINED_BESIDE)
    same = {name: getattr(trained, name) for name in names} | {"bias": "none", "inference_mode": True}
    patterns = {"rank_pattern": others, "alpha_pattern": dict(others), "target_modules": list(ranks)}
    config = LoraConfig(r=largest, lora_alpha=largest, **patterns, **same)
    return config, {name: tensor.contiguous() for name, tensor in weights.items()}


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
        if not self._importance:
            return {f"{module.path}.kept": mask for module, mask in zip(self._modules, self._masks, strict=True)}
        return {
            f"{name}.{kind}": tensor
            for kind, tensors in (("importance", self._importance), ("uncertainty", self._uncertainty))
            for name, tensor in zip(self._names, tensors, strict=True)
        }

    def restore(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
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
        if step in self._changes:
            givers, takers = self._givers_and_takers()
            for module in givers:
                _drop(module, optimizer)
            for module in takers:
                _add(module, optimizer, self._generator)

    def state(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def restore(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
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
    energy = in_float64(e.flatten()).square()
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
    other = torch.float16 if data.dtype == torch.float32 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
