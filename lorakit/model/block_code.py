"""Whose code computes a model's blocks in a run: its own, kernels in the place of some of it, or compiled."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorakit.model.compiled_blocks import compile_blocks
from lorakit.model.cpu_kernels import blocks_of_queries, cpu_kernels, few_rows_layers, few_rows_linear
from lorakit.model.fused_lora import fused_lora, release_int8_inputs, replace_forward
from lorakit.model.kernels import NO_KERNELS, Kernels, use_kernels
from lorakit.model.loss import causal_of


@dataclass(frozen=True)
class BlockCode:
    """As it stands here, the model's own code, with lorakit's functions for the adapters' layers."""

    kernels: Kernels = NO_KERNELS
    compiled: bool = False
    words: str = "plain"
    """What the manifest calls it."""
    on_stop: Callable[[str], None] = lambda reason: None
    """Is told why compiled blocks went back to plain code."""


PLAIN = BlockCode()


@contextmanager
def use_block_code(model: Any, code: BlockCode) -> Iterator[None]:
    """Within this, a model's blocks compute so; afterwards the model is as it was."""
    with ExitStack() as stack:
        if code.compiled:  # through PEFT's forward: see compiled_blocks.py
            stack.enter_context(compile_blocks(model, code.on_stop))
        else:
            stack.enter_context(release_int8_inputs(model))
            stack.enter_context(fused_lora(model))
            stack.enter_context(use_kernels(model, code.kernels))
        yield


@contextmanager
def use_inference_code(model: Any) -> Iterator[None]:
    """Within this, the blocks of a causal language model that answers or is scored compute in fewer passes over memory
    and in the order that suits its processor, to the same result within rounding; afterwards it is as it was."""
    causal = causal_of(model)
    on_cpu = causal.device.type == "cpu" and causal.dtype == torch.float32
    kernels, linear_layers = (cpu_kernels(), few_rows_layers(model)) if on_cpu else (NO_KERNELS, [])
    with (
        fused_lora(model),
        use_kernels(model, kernels),
        replace_forward(linear_layers, lambda layer: partial(few_rows_linear, layer)),
        blocks_of_queries() if on_cpu else nullcontext(),
    ):
        yield
