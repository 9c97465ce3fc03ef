"""Gradient checkpointing: activations are computed again in the backward pass instead of being kept."""

from typing import Any

from lorakit.errors import UserError
from lorakit.hardware.memory import return_freed_memory
from lorakit.model.shared_prefix import causal_of


def supports_gradient_checkpointing(model: Any) -> bool:
    """Whether the model's family has it."""
    causal = causal_of(model)
    has = any(hasattr(module, "gradient_checkpointing") for module in causal.modules())
    return has and bool(getattr(causal, "supports_gradient_checkpointing", False))


def uses_gradient_checkpointing(model: Any) -> bool:
    """Whether it is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in causal_of(model).modules())


def set_gradient_checkpointing(model: Any, on: bool) -> None:
    """Turn it on or off. The gradients are the same.

    Raises:
        UserError: the model's family has no gradient checkpointing.
    """
    causal = causal_of(model)
    if on and not supports_gradient_checkpointing(model):
        raise UserError(
            f"train.gradient_checkpointing: {type(causal).__name__} has none in transformers. Write false, and a "
            "smaller micro_batch."
        )
    if on:
        # The other form, reentrant, reaches no weights of a layer whose input needs no gradient.
        if next(causal.parameters()).device.type == "cpu":
            return_freed_memory()  # else the holes that blocks leave behind take up what is saved
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif uses_gradient_checkpointing(model):
        causal.activation_checkpointing_disable()
