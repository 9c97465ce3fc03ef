"""Adapters that start from the base's own main directions, without changing the base.

PEFT takes the first product B0 A0 out of the base's weights, which rounds them and cannot be done to quantized ones.
Here a second, frozen adapter holds A0 and -B0: the model computes W x + s (B A - B0 A0) x, to the same gradients.
Saved, the two become one plain LoRA of twice the rank, on the base as it is.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers.pytorch_utils import Conv1D

from lorakit.errors import UserError
from lorakit.progress import Progress

INITIAL = "initial"
"""The name of the frozen adapter that holds what the trained one began with."""

Factors = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]
"""A weight (out, in), a rank and the adapter's scale -> B (out, rank) and A (rank, in) to begin with."""


def start_principal(model: Any, factors: Factors, progress: Progress) -> None:
    """Put the factors of each weight into the trained adapter, and their negative beside it."""
    with_initial(model)
    layers = list(lora_layers(model))
    tight = [(min(layer.in_features, layer.out_features), name) for name, layer in layers if _is_tight(layer)]
    if tight:
        most, name = min(tight)
        raise UserError(
            f"adapter.rank: {len(tight)} modules have fewer directions than their rank, {name} only {most}. Write "
            "a smaller one, or one for these modules in adapter.rank_overrides."
        )
    with torch.no_grad(), progress.bar("main directions of the weights", total=len(layers)) as bar:
        for _, layer in layers:
            rank, weight = layer.r["default"], weight_of(layer.get_base_layer())
            b, a = factors(weight, rank, layer.scaling["default"])
            for adapter, sign in (("default", 1), (INITIAL, -1)):
                layer.lora_A[adapter].weight.copy_(a)
                layer.lora_B[adapter].weight.copy_(sign * b)
            bar.advance(1)


def _is_tight(layer: Any) -> bool:
    return bool(layer.r["default"] > min(layer.in_features, layer.out_features))


def truncated_svd(iterations: int | None) -> Factors:
    """PiSSA's factors: the largest singular directions, half of each value in B and half in A.

    `iterations`: rounds of the randomized decomposition (Halko et al., arXiv 0909.4061); None is the exact one.
    """

    def factors(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        if iterations is None:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            u, s, v = u[:, :rank], s[:rank], v[:rank]
        else:
            u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
            v = v.t()
        root = (s / scale).sqrt()
        return u * root, root[:, None] * v

    return factors


def first_of_qr(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """OLoRA's factors: the first columns of Q and rows of R."""
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def with_initial(model: Any) -> Any:
    """The PEFT model with a second adapter of the same shape beside the trained one, active and frozen."""
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights, config.modules_to_save, config.modules_to_tie = False, None, None
    config.lora_dropout = 0.0  # what is taken out of the base is taken out whole
    model.add_adapter(INITIAL, config)
    model.base_model.set_adapter(["default", INITIAL])
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            parameter.requires_grad_(False)
    return model


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer with its path in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def weight_of(layer: Any) -> torch.Tensor:
    """A layer's weight in float32, dequantized, (out, in)."""
    weight = dequantize_module_weight(layer).detach().float()
    return weight.t() if isinstance(layer, Conv1D) else weight
