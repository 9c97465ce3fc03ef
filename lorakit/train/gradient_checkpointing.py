"""Gradient checkpointing: activations that are computed again in the backward pass instead of being held."""

from typing import Any

from lorakit.errors import UserError
from lorakit.hardware.memory import return_freed_memory
from lorakit.model.loss import causal_of


def supports_gradient_checkpointing(model: Any) -> bool:
    """Whether the model's family can compute activations again in the backward pass."""
    causal = causal_of(model)
    has = any(hasattr(module, "gradient_checkpointing") for module in causal.modules())
    return has and bool(getattr(causal, "supports_gradient_checkpointing", False))


def uses_gradient_checkpointing(model: Any) -> bool:
    """Whether it is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in causal_of(model).modules())


def set_gradient_checkpointing(model: Any, on: bool) -> None:
    """Turn it on, with a UserError where the model's family has none, or off. The gradients are the same."""
    causal = causal_of(model)
    if on and not supports_gradient_checkpointing(model):
        raise UserError(f"train.gradient_checkpointing: {type(causal).__name__} has none in transformers. Write false.")
    if on:
        if next(causal.parameters()).device.type == "cpu":
            return_freed_memory()  # otherwise the holes that blocks leave take up what is saved
        # The other form, reentrant, reaches no weights of a layer whose input needs no gradient.
        settings: dict[str, Any] = {"use_reentrant": False}
        if hasattr(next(causal.parameters()), "ds_id"):
            # DeepSpeed has given weights back when torch compares the shapes of what was saved with the first pass's.
            settings["determinism_check"] = "none"
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    elif uses_gradient_checkpointing(model):
        causal.activation_checkpointing_disable()
