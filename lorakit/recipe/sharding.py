"""`train.sharding`: what a strategy goes with, and which of them several devices train with."""

from collections.abc import Iterator

from lorakit.errors import UserError
from lorakit.recipe.adapter_kind import adapter_spec
from lorakit.recipe.problem import PathParts
from lorakit.recipe.schema import Recipe, Train

TRAINABLE = ("none", "fsdp")
"""The strategies in which several processes train; the others are planned only."""

_CONFLICTS: tuple[tuple[tuple[str, ...], dict[str, tuple[str, ...]], str, str], ...] = (
    (
        ("zero-2", "zero-3"),
        {"adapter.kind": ("flexlora",)},
        "DeepSpeed lays the trained weights out once, and flexlora changes the shapes of its matrices",
        "Write sharding: none or fsdp, or another adapter.kind.",
    ),
    (
        ("fsdp",),
        {"adapter.kind": ("none",), "train.optimizer": ("adamw-8bit", "paged-adamw", "paged-adamw-8bit")},
        "bitsandbytes' optimizers do not train weights of which each device holds a part",
        "Write optimizer: adamw, or sharding: none.",
    ),
    (
        ("fsdp",),
        {"adapter.kind": ("none",), "model.dtype": ("float16",)},
        "loss scaling looks for overflows in the gradients of this device alone, which has a part of them",
        "Write dtype: bfloat16 or float32, or sharding: none.",
    ),
)
"""Strategies, and values by key with which together they cannot work; why, and what to write instead."""


def sharding_conflicts(recipe: Recipe, sharding: str) -> Iterator[tuple[PathParts, str, str]]:
    """What of a recipe a strategy does not go with: key, reason, remedy."""
    kind = adapter_spec(recipe.adapter)
    values = {
        "adapter.kind": kind.name,
        "model.quantization": kind.quantizes or recipe.model.quantization,
        "train.optimizer": recipe.train.optimizer,
        "model.dtype": recipe.model.dtype,
    }
    for shardings, others, reason, remedy in _CONFLICTS:
        if sharding in shardings and all(values[key] in words for key, words in others.items()):
            yield ("train", "sharding"), reason, remedy


def refuse_untrained(sharding: str, devices: int) -> None:
    """Refuse a strategy in which several processes do not train yet; alone every one of them is harmless."""
    if devices > 1 and sharding not in ("auto", *TRAINABLE):
        raise UserError(
            f"train.sharding: {sharding} is planned, not trained, on {devices} devices. Write {', '.join(TRAINABLE)} "
            "or auto."
        )


def describe_idle_sharding(train: Train, devices: int) -> str:
    """In words, that a strategy which the recipe names has nothing to share out; empty where it has."""
    if devices > 1 or train.sharding in ("auto", "none"):
        return ""
    return f"train.sharding: {train.sharding} has nothing to do on one device"
