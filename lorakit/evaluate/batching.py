"""Work in batches that fit into memory: as many rows at once as an estimate allows, halved if it was wrong."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from lorakit.errors import LorakitError
from lorakit.hardware.machine import processor
from lorakit.hardware.memory import OutOfMemory, free_memory, within_memory

Item = TypeVar("Item")

# The share of free memory that keys and values may take; activations and logits need the rest.
_SHARE = 0.25
_LEAST, _MOST = 1 << 11, 1 << 20


def tokens_at_once(model: Any) -> int:
    """How many tokens' keys and values fit at once, with padding, into what is free on the model's device."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = getattr(text, "num_hidden_layers", None) or 1
    stored = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * width * model.dtype.itemsize
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else processor().memory
    return int(min(max(free * _SHARE / stored, _LEAST), _MOST))


def in_batches(
    items: Sequence[Item],
    size: Callable[[Item], int],
    rows: int,
    tokens: int,
    work: Callable[[list[Item]], list[Item]],
) -> None:
    """Call `work` on batches of items of similar size, the largest first. It returns the items that need more.

    A batch has at most `rows` items and `tokens` tokens (its items times the largest size), but at least one item.
    Where memory runs out, batches from then on are half as large; an error where not even one item fits.
    """
    waiting = sorted(items, key=size)
    while waiting:
        most = max(1, min(rows, tokens // max(size(waiting[-1]), 1)))
        batch = waiting[-most:]
        left = within_memory(partial(work, batch))
        if isinstance(left, OutOfMemory):
            free_memory()
            if len(batch) == 1:
                raise LorakitError(
                    f"out of memory on one row of {size(batch[0]):,} tokens. Give shorter rows, a smaller "
                    "--max-new-tokens, or a machine with more memory."
                )
            rows = len(batch) // 2
            continue
        del waiting[-most:]
        if left:
            waiting = sorted([*waiting, *left], key=size)
