"""torch.compile of a model's blocks, one compilation for all that are alike: the regional compilation of torch's own
tutorials. What a block computes between its products becomes a few kernels, and Python leaves the way of the launches.

A block is compiled whole, or not at all (`fullgraph`), for tokens of any number (`dynamic`): nothing falls back to
plain code without a word. Adapters' layers inside are computed by PEFT's forward, which the compiler follows; lorakit's
own functions (fused_lora.py) keep caches that it cannot.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers.modeling_layers import GradientCheckpointingLayer

from lorakit.model.kernels import replaced
from lorakit.model.loss import body_of, causal_of

# Graphs that one kind of block may have: with and without a mask, of one row and of several, of a first block, whose
# input takes no gradient, and of attention that differs from layer to layer. Beyond them shapes change too often.
MOST_GRAPHS = 24


class CompiledBlocks:
    """The state of compiled blocks: `stopped` says why they went back to plain code, "" while they did not."""

    def __init__(self, on_stop: Callable[[str], None], backend: str) -> None:
        self.stopped, self._on_stop, self._backend = "", on_stop, backend
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def forward(self, block: Any) -> Callable[..., Any]:
        """The forward of a block, as a method: compiled inside of gradient checkpointing, where that is on."""
        plain = type(block).forward.__wrapped__  # transformers wraps it for checkpointing
        made = torch.compile(plain, fullgraph=True, dynamic=True, backend=self._backend)
        compiled = self._compiled.setdefault(plain, made)

        def run(block: Any, *args: Any, **named: Any) -> Any:
            try:
                return compiled(block, *args, **named)
            except FailOnRecompileLimitHit:
                self.stopped = f"more than {MOST_GRAPHS} graphs of one block: shapes change too often"
                self._on_stop(self.stopped)
                return plain(block, *args, **named)

        def forward(block: Any, *args: Any, **named: Any) -> Any:
            # A beginning that all rows share goes through the cache, which has another place for each layer.
            if self.stopped or not torch.is_grad_enabled() or named.get("past_key_values") is not None:
                return type(block).forward(block, *args, **named)
            if block.gradient_checkpointing and block.training:
                return block._gradient_checkpointing_func(partial(run, block, **named), *args)
            return run(block, *args, **named)

        return MethodType(forward, block)


def blocks_of(model: Any) -> list[Any]:
    """The blocks of a causal language model that can be compiled, with an adapter or without."""
    body = body_of(causal_of(model))
    names = set(getattr(body, "_no_split_modules", None) or ())
    return [
        module
        for module in body.modules()
        if type(module).__name__ in names and isinstance(module, GradientCheckpointingLayer)
    ]


@contextmanager
def compile_blocks(model: Any, on_stop: Callable[[str], None], backend: str = "inductor") -> Iterator[CompiledBlocks]:
    """Within this, blocks are compiled when a gradient is to flow through them; afterwards the model is as it was.
    `on_stop` is told the reason where they go back to plain code, to the same result. `backend`: torch's name of what
    makes code of the graphs."""
    blocks = CompiledBlocks(on_stop, backend)
    limit = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True)
    forwards = [(block, "forward", blocks.forward(block)) for block in blocks_of(model)]
    # It would write a dozen lines where the limit is reached, which `on_stop` is told.
    silent = (logging.getLogger("torch._dynamo.convert_frame"), "disabled", True)
    with limit, replaced([*forwards, silent]):
        yield blocks
