"""Variable-length attention by torch's own FlashAttention, for rows that lie end to end, as an attention of
transformers (`AttentionInterface`): `model.attention: varlen`.

On a GPU it is `torch.nn.attention.varlen`; on a processor each row by itself goes through
`scaled_dot_product_attention`, with the same numbers. It is for training alone: it never gets a mask, so that it cannot
generate from padded prompts. A model is loaded with sdpa, and takes this when it is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from lorakit.errors import UserError
from lorakit.recipe.attention import is_plain_attention

VARLEN = "varlen"

# FlashAttention 2 wants heads of a multiple of so many numbers (torch's flash_api.cpp).
_MULTIPLE = 8
# Arguments by which families change the scores, and that FlashAttention in torch does not have.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def takes_varlen(kind: Any, config: Any) -> bool:
    """Whether variable-length attention computes what a family's class does, with this config: it is what both sdpa and
    FlashAttention compute, in every layer, without dropout, and of heads that are not too wide."""
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_attention_backend")
    if not all(getattr(kind, flag, False) for flag in flags) or getattr(kind, "_is_stateful", False):
        return False
    text = config.get_text_config()
    keys = {name: getattr(text, name) for name in text.attribute_map}
    return is_plain_attention(text.to_dict() | keys)


def use_varlen(causal: Any) -> None:
    """Let a causal language model, loaded with sdpa, attend by variable length from now on."""
    causal.set_attn_implementation(VARLEN)


@contextmanager
def plain_attention(causal: Any) -> Iterator[None]:
    """Within this, a model with variable-length attention has sdpa, which takes masks."""
    replaced = causal.config._attn_implementation == VARLEN
    if replaced:
        causal.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if replaced:
            causal.set_attn_implementation(VARLEN)


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row: query (batch, heads, tokens, width), key and value with as many heads or fewer
    -> (batch, tokens, heads, width of a value).

    `cu_seq_lens_q`: where the rows of the one that holds all end to end begin, and its end, in tokens; `max_length_q`
    is the longest. Without them each of the batch is a row, padded on the right. UserError where the family asks for
    what this attention does not do.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unsupported = [name for name in _UNKNOWN if others.get(name) is not None]
    unsupported += (
        ["a mask"] * (attention_mask is not None) + ["dropout"] * (dropout > 0) + ["no causal order"] * (not causal)
    )
    if unsupported or query.shape[2] != key.shape[2]:
        unsupported = unsupported or ["keys from a cache"]
        reason = f"varlen does not do what this model asks of attention: {unsupported[0]}"
        raise UserError(f"model.attention: {reason}. Write sdpa or eager.")
    attend = _of_gpu if query.is_cuda else _row_by_row
    return attend(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None


def _of_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    starts: Tensor | None,
    longest: Any,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, _, tokens, width = query.shape
    if starts is None:
        starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
        longest = tokens
    # Some families leave what they have rotated or normalized in float32.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    widened = max(width, value.shape[-1])
    widened += -widened % _MULTIPLE

    def lay_flat(part: Tensor) -> Tensor:
        flat = part.transpose(1, 2).flatten(0, 1).to(dtype)
        return pad(flat, (0, widened - part.shape[-1])) if part.shape[-1] < widened else flat

    output = varlen_attn(
        lay_flat(query),
        lay_flat(key),
        lay_flat(value),
        starts,
        starts,
        longest,
        longest,
        scale=width**-0.5 if scaling is None else scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[..., : value.shape[-1]].unflatten(0, (batch, tokens))


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    starts: Tensor | None,
    longest: Any,
) -> Tensor:
    lengths = [query.shape[2]] if starts is None else starts.diff().tolist()
    value = value.to(query.dtype)
    rows = zip(*(part.split(lengths, dim=2) for part in (query, key.to(query.dtype), value)), strict=True)
    outputs = []
    for q, k, v in rows:
        length = q.shape[2]
        band = None
        if window is not None and length > window:
            band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, band, is_causal=band is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    whole = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return whole.transpose(1, 2).contiguous()


AttentionInterface.register(VARLEN, varlen_attention)
