"""The words of `model.attention`: how each takes packed rows, and what it needs. Without torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class AttentionSpec:
    """An implementation of attention. `package` has its kernels, where they are not torch's, as the module `module`."""

    flat: bool = False  # packs lie end to end in one row, and are told apart by where their rows begin
    dense_mask: bool = False  # packs are told apart by a number for each pair of tokens
    half: bool = False  # on a GPU it computes in half precision only, on cards that have bfloat16
    module: str = ""
    package: str = ""


ATTENTIONS = {
    "eager": AttentionSpec(dense_mask=True),
    "sdpa": AttentionSpec(dense_mask=True),
    "varlen": AttentionSpec(flat=True, half=True),
    "flash_attention_2": AttentionSpec(flat=True, half=True, module="flash_attn", package="flash-attn"),
    "flash_attention_3": AttentionSpec(flat=True, half=True, module="flash_attn_interface", package="flash-attn-3"),
    "flex_attention": AttentionSpec(),
}

# torch 2.10 has variable-length attention, without a scale, windows, and keys that several heads share.
_VARLEN_TORCH = (2, 13)
# The widest heads that FlashAttention 2 takes (torch's flash_api.cpp).
_WIDEST_HEAD = 256
# Keys of configs for dropout within attention, which torch's variable-length attention has not.
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def is_installed(attention: str) -> bool:
    """Whether the package that an attention needs is here. FlashAttention 2 and 4 are one module, so the package's name
    counts, as for transformers (its utils/import_utils.py), which in place of a package would fetch a hub's kernel."""
    spec = ATTENTIONS[attention]
    if spec.module:
        names = packages_distributions().get(spec.module, []) if find_spec(spec.module) else []
        return spec.package in [name.replace("_", "-") for name in names]
    return attention != "varlen" or _torch_version() >= _VARLEN_TORCH


def _torch_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, re.findall(r"\d+", version("torch"))[:2]))
    except PackageNotFoundError:
        return (0,)


def is_plain_attention(config: Mapping[str, Any]) -> bool:
    """Whether variable-length attention can compute what a config says: in every layer attention to all earlier tokens
    or to a window of them, no dropout, and heads that are not too wide."""
    if not set(config.get("layer_types") or ()) <= _PLAIN_LAYERS or any(config.get(key) for key in _DROPOUT):
        return False
    latent = config.get("qk_nope_head_dim") or 0  # DeepSeek's attention: a part that is rotated, and one not
    widths = [config.get(key) or 0 for key in ("head_dim", "global_head_dim")]
    width = latent + (config.get("qk_rope_head_dim") or 0) if latent else max(widths)
    hidden, heads = (config.get("hidden_size") or config.get("n_embd"), config.get("num_attention_heads"))
    return (width or (hidden or 0) // (heads or config.get("n_head") or 1)) <= _WIDEST_HEAD
