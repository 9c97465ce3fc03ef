"""The shared beginning of a batch, computed once.

Rows of one task mostly begin alike: the template's header and one system prompt. In a causal model the states of these
tokens are the same in every row, so they are computed for one row and every row attends to them, gradients included.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

IGNORED = -100  # torch's ignore_index: the label of a token that is not trained

_WORTHWHILE = 12  # tokens: a shorter beginning is not worth a second pass over the layers


def causal_of(model: Any) -> Any:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(causal: Any) -> Any:
    """The part of a causal language model whose last hidden states its head reads. `get_decoder()` gives it in every
    family but those that name another part in `base_model_prefix` (Llama 4's text model), where it gives the whole
    model, and those that call their head so (ModernBERT's decoder)."""
    decoder = causal.get_decoder()
    return causal.model if decoder is causal or decoder is causal.get_output_embeddings() else decoder


def body_output(
    causal: Any, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Any, int]:
    """What the model's body gives for right-padded or packed rows, and how many leading tokens its states leave out.
    The last hidden states are (rows, tokens - left out, width); nothing before them predicts a trained token."""
    body = body_of(causal)
    if attention_mask is None:
        return body(input_ids=input_ids, position_ids=position_ids, use_cache=False), 0
    # Leading tokens that are the same in all rows, before the state that predicts the first trained token.
    tokens = input_ids.shape[1]
    differing = _first_of((input_ids != input_ids[:1]) | (attention_mask == 0), tokens)
    shared = min(differing, _first_of(labels != IGNORED, tokens) - 1)
    if len(input_ids) > 1 and shared >= _WORTHWHILE and _may_share(causal):
        cache = DynamicCache(config=causal.config.get_text_config())
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            body(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(input_ids))
            rest = input_ids[:, shared:]
            return body(input_ids=rest, attention_mask=attention_mask, past_key_values=cache, use_cache=True), shared
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False), 0


def _first_of(where: Tensor, otherwise: int) -> int:
    columns = where.any(0)
    return int(columns.int().argmax()) if bool(columns.any()) else otherwise


def _may_share(causal: Any) -> bool:
    """Not where each row gets its own dropout, activations are recomputed, or attention is not one of the plain two;
    nor where the weights are dequantized in each pass, which costs more than the tokens saved."""
    if causal.config._attn_implementation not in ("eager", "sdpa") or getattr(causal, "is_quantized", False):
        return False
    return not any(
        getattr(module, "gradient_checkpointing", False) or (isinstance(module, torch.nn.Dropout) and module.p > 0)
        for module in causal.modules()
        if module.training
    )
