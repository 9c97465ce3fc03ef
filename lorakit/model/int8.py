"""LLM.int8 without the inputs that it keeps for a gradient that nobody asks for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt

# What bitsandbytes' products (autograd/_functions.py) keep for the gradient of the weight, by the name of their node.
_KEPT: dict[str, tuple[str, Any]] = {
    "MatMul8bitLtBackward": ("tensors", (None, None, None)),
    "MatMul8bitFpBackward": ("A", None),
}


@contextmanager
def release_int8_inputs(model: Any) -> Iterator[None]:
    """Within this, the int8 layers of `model` let go of their inputs. The gradients are the same.

    bitsandbytes holds the input of each layer on the node itself, not among the saved tensors, so that gradient
    checkpointing does not get at it. Only a gradient of the weight, which is frozen, would need it.
    """
    layers = [module for module in model.modules() if type(module) is Linear8bitLt]
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    output = forward(x)
    node = output.grad_fn
    kept = _KEPT.get(type(node).__name__)
    if kept and not node.needs_input_grad[1]:
        setattr(node, *kept)
    return output
