"""`train.sharding`: what a strategy goes with, and what it needs."""

from collections.abc import Iterator
from importlib.util import find_spec

from lorakit.errors import UserError
from lorakit.recipe.adapter_kind import adapter_spec
from lorakit.recipe.problem import PathParts
from lorakit.recipe.schema import Recipe, Train

_DEEPSPEED = ("zero-2", "zero-3")
_CONFLICTS: tuple[tuple[tuple[str, ...], dict[str, tuple[str | bool, ...]], str, str], ...] = (
    (
        _DEEPSPEED,
        {"adapter.kind": ("flexlora",)},
        "DeepSpeed lays the trained weights out once, and flexlora changes the shapes of its matrices",
        "Write sharding: none or fsdp, or another adapter.kind.",
    ),
    (
        _DEEPSPEED,
        {"train.optimizer": ("adamw-8bit", "paged-adamw", "paged-adamw-8bit")},
        "DeepSpeed shares out the states of torch's AdamW, not those of bitsandbytes' optimizers",
        "Write optimizer: adamw, or sharding: none or fsdp.",
    ),
    (
        _DEEPSPEED,
        {"model.dtype": ("float16",)},
        "DeepSpeed scales a float16 loss by itself, and would round the trained weights to float16",
        "Write dtype: bfloat16 or float32, or sharding: none.",
    ),
    (
        ("zero-3",),
        {"model.quantization": ("q8",)},
        "bitsandbytes' int8 layers hold their weights a second time, which DeepSpeed does not share out",
        "Write quantization: nf4, or sharding: fsdp or zero-2.",
    ),
    (
        ("fsdp", *_DEEPSPEED),
        {"train.offload_activations": (True,)},
        "activations are sent to main memory only where each device holds the whole model",
        "Write offload_activations: false, or sharding: none.",
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
        "model.dtype": recipe.model.dtype,
        "train.optimizer": recipe.train.optimizer,
        "train.offload_activations": recipe.train.offload_activations,
    }
    for shardings, others, reason, remedy in _CONFLICTS:
        if sharding in shardings and all(values[key] in words for key, words in others.items()):
            yield ("train", "sharding"), reason, remedy


def missing_package(sharding: str) -> str:
    """In words, that a strategy needs a package that is not installed, and the remedy; empty where it is."""
    if sharding not in _DEEPSPEED or find_spec("deepspeed"):
        return ""
    return (
        f"train.sharding: {sharding} needs a package that is not installed (deepspeed). Install it with "
        "pip install 'lorakit[deepspeed]', or write none or fsdp."
    )


def refuse_missing_package(sharding: str, devices: int) -> None:
    """Refuse a strategy whose package is not installed; on one device it has nothing to do."""
    if devices > 1 and (message := missing_package(sharding)):
        raise UserError(message)


def describe_idle_sharding(train: Train, devices: int) -> str:
    """In words, that a strategy which the recipe names has nothing to share out; empty where it has."""
    if devices > 1 or train.sharding in ("auto", "none"):
        return ""
    return f"train.sharding: {train.sharding} has nothing to do on one device"
