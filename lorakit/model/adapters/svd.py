"""Adapters held as B diag(E) A, in PEFT's AdaLoRA layers: what adalora and flexlora share.

Such a layer adds `alpha / ranknum * B (E * A) x` to its base, with A (rank, in), E (rank, 1) and B (out, rank). A
direction is one row of A with its number in E and its column of B.
"""

import math
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

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
    """How far directions are from orthonormal: the mean over all A and B of |A A^T - I| and |B^T B - I| (Frobenius), as
    in AdaLoRA's and FlexLoRA's published code."""
    wide, tall = [module.a for module in modules], [module.b for module in modules]
    with torch.autocast(wide[0].device.type, enabled=False):
        return _FromOrthonormal.apply(*wide, *tall)


class _FromOrthonormal(torch.autograd.Function):
    """With its gradient, 2 (A A^T - I) A / |A A^T - I|: autograd would go back through both factors of every product,
    which takes twice as long on a CPU."""

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
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=trained.lora_dropout,
        target_modules=list(ranks),
        modules_to_save=trained.modules_to_save,
        ensure_weight_tying=trained.ensure_weight_tying,
        fan_in_fan_out=trained.fan_in_fan_out,
        bias="none",
        task_type=trained.task_type,
        inference_mode=True,
    )
    return config, {name: tensor.contiguous() for name, tensor in weights.items()}
