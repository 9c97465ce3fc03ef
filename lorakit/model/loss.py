"""The supervised-only loss: the language-model head is computed where a token is trained, in chunks, nowhere else; and
the shared beginning of a batch is computed once.

Rows of one task mostly begin alike: the template's header and one system prompt. In a causal model the states of these
tokens are the same in every row, so they are computed for one row and every row attends to them, gradients included.
"""

from dataclasses import replace
from inspect import signature
from itertools import chain
from typing import Any

import torch
from peft.utils import TrainableTokensWrapper
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lorakit.distributed.processes import largest
from lorakit.hardware.accelerator import memory_of
from lorakit.model.attention import plain_attention
from lorakit.model.logit_chunks import CHUNK_LOGITS, chunk_logits
from lorakit.model.trained_tokens import TrainedTokens, find_trained_tokens

_WORTHWHILE = 12  # tokens: a shorter beginning is not worth a second pass over the layers
# What attends to a shared beginning needs a mask, and so computes pairs that nobody sees: for R of a row's T tokens as
# much as R T / (this x hidden width) tokens cost in all other operations (measured on a processor, T 110 to 1,000).
_MASK_COST = 6
# Dequantizing a weight once more takes a processor as long as its product with 40 to 80 tokens (measured, widths 576 to
# 2,048, NF4): less than so many tokens saved are not worth it.
_DEQUANTIZING_COST = 128


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
    causal: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    once: bool = False,
    trained: TrainedTokens | None = None,
    **packed: Any,
) -> tuple[Any, int]:
    """What the model's body gives for right-padded or packed rows, and how many leading tokens its states leave out.
    The last hidden states are (rows, tokens - left out, width); nothing before them predicts a trained token. `once`:
    the body is called once, whatever the rows are. `trained`: the trained tokens, where they were found before.
    `packed`: by what the body tells packed rows apart.

    The body gets no mask of right-padded rows: in a causal model no token sees the padding behind it, and without a
    mask attention leaves out the half of all pairs that nobody sees, and keeps nothing for each pair."""
    body = body_of(causal)
    if attention_mask is None:
        return body(input_ids=input_ids, use_cache=False, **_known_arguments(body, packed)), 0
    if trained is None:
        trained = find_trained_tokens(input_ids, attention_mask, labels)
    shared, tokens = trained.shared, input_ids.shape[1]
    if not once and _saves(causal, len(input_ids), shared, tokens) and _may_share(causal):
        cache = DynamicCache(config=causal.config.get_text_config())
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            body(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(input_ids))
            rest = input_ids[:, shared:]
            return body(input_ids=rest, attention_mask=attention_mask, past_key_values=cache, use_cache=True), shared
    return body(input_ids=input_ids, use_cache=False), 0


def _known_arguments(body: Any, packed: dict[str, Any]) -> dict[str, Any]:
    """Of what tells packed rows apart what the body knows: families that are older than FlashAttention's arguments go
    by the positions."""
    known = signature(body.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return {name: value for name, value in packed.items() if takes_any or name in known}


def _saves(causal: Any, rows: int, shared: int, tokens: int) -> bool:
    """Whether computing so many of so many tokens once saves more than attending to them, and another pass over the
    weights, cost."""
    saved = (rows - 1) * shared if causal.device.type == "cpu" else 0
    # On a GPU it takes as long as many more tokens; and int8 layers there round what they are given by all of it.
    if getattr(causal, "is_quantized", False) and saved < _DEQUANTIZING_COST:
        return False
    mask = (tokens - shared) * tokens // (_MASK_COST * causal.config.get_text_config().hidden_size)
    return rows > 1 and shared >= max(_WORTHWHILE, mask)


def _may_share(causal: Any) -> bool:
    """Not where each row gets its own dropout, activations are recomputed, or attention is not one of the plain two."""
    if causal.config._attn_implementation not in ("eager", "sdpa"):
        return False
    return not any(
        getattr(module, "gradient_checkpointing", False) or (isinstance(module, torch.nn.Dropout) and module.p > 0)
        for module in causal.modules()
        if module.training
    )


# How far two ways to one number may differ, as a share, by the arithmetic: float32, or half precision.
EXACT, HALF = 1e-4, 2e-2

_CHUNK_LOGITS = CHUNK_LOGITS


def supervised_loss(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    once: bool = False,
    trained: TrainedTokens | None = None,
    **packed: Any,
) -> tuple[Tensor, int]:
    """The summed cross-entropy of all trained tokens, in float32, and their number.

    `input_ids`, `attention_mask` and `labels` are (rows, tokens); labels are -100 where nothing is trained, and the one
    at position t is predicted from what stands before it. `model` may be a PEFT model. `once`: several processes call
    the layers alike: the body once, so that a beginning that all rows share is computed for each, and the head as often
    as the one with the most tokens. `trained`: the rows' trained tokens, where they were found before: no pass then
    waits for a device to find them. `packed`: of packed rows, whose `attention_mask` is None, what `collate_packed`
    gives besides: position_ids (rows, tokens) that begin anew with each, and where flat ones begin.
    """
    causal = causal_of(model)
    output, hidden, targets, _ = trained_states(causal, input_ids, attention_mask, labels, once, trained, **packed)
    at_once = _CHUNK_LOGITS if hidden.device.type == "cpu" else chunk_logits(memory_of(hidden.device))
    longest = max(1, at_once // causal.config.get_text_config().vocab_size)
    chunks = max(1, -(-len(targets) // longest))
    chunks = largest(chunks) if once else chunks
    # keeps a batch without trained tokens connected to the weights
    total = hidden.sum().float() * 0.0
    if torch.is_grad_enabled() and hidden.requires_grad and not once and not _trains_head(causal):
        return total + _HeadLoss.apply(hidden, targets, causal, output, chunks), len(targets)
    for chunk_hidden, chunk_targets in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
        arguments = (causal, output, chunk_hidden, chunk_targets)
        if chunks > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False)
        else:
            total = total + _chunk_loss(*arguments)
    return total, len(targets)


def trained_states(
    causal: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    once: bool = False,
    trained: TrainedTokens | None = None,
    **packed: Any,
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """What predicts the trained tokens: the body's output, its states (tokens, width), the tokens, their rows."""
    if trained is None:
        trained = find_trained_tokens(input_ids, attention_mask, labels)
    output, skipped = body_output(causal, input_ids, attention_mask, labels, once, trained, **packed)
    states = output.last_hidden_state
    places = trained.rows * states.shape[1] + trained.columns - skipped
    return output, states.flatten(0, 1).index_select(0, places), trained.targets, trained.rows


def _trains_head(causal: Any) -> bool:
    """Whether the head has weights that are trained: its own, tied ones, or those of an adapter."""
    inside = {id(parameter) for parameter in body_of(causal).parameters()}
    outside = (parameter for parameter in causal.parameters() if id(parameter) not in inside)
    head = causal.get_output_embeddings()
    weights = chain(outside, head.parameters() if head is not None else ())
    if isinstance(head, TrainableTokensWrapper):  # whose tied rows are the embeddings', and no parameters of its own
        weights = chain(weights, head.token_adapter.trainable_tokens_delta.values())
    return any(parameter.requires_grad for parameter in weights)


def _chunk_loss(causal: Any, output: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head_logits(causal, output, hidden)
    if not logits.requires_grad:
        return cross_entropy(logits.float(), targets, reduction="sum")
    return _CrossEntropy.apply(logits, targets)


class _HeadLoss(torch.autograd.Function):
    """Head and summed cross-entropy, chunk by chunk, with the gradient of the hidden states made in the forward pass:
    where the head is frozen nothing else is needed of it, so that its logits are never kept nor computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, causal: Any, output: Any, chunks: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        parts = (tensor.tensor_split(chunks) for tensor in (hidden, targets, gradient))
        for chunk, chunk_targets, place in zip(*parts, strict=True):
            with torch.enable_grad():
                chunk = chunk.detach().requires_grad_()
                logits = head_logits(causal, output, chunk)
            loss, of_logits = _cross_entropy(logits.detach(), chunk_targets)
            place.copy_(torch.autograd.grad(logits, chunk, of_logits)[0])
            total += loss
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in float32, with its gradient made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, gradient = _cross_entropy(logits, targets)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale.to(gradient.dtype)), None  # nobody reads it again


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy in float32, and its gradient (positions, vocabulary) in the type of the logits."""
    shares = torch.log_softmax(logits, -1, dtype=torch.float32)
    loss = -shares.gather(-1, targets[:, None]).sum()
    gradient = shares.exp_()
    gradient.scatter_add_(-1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    return loss, gradient.to(logits.dtype)


def head_logits(causal: Any, output: Any, hidden: Tensor) -> Tensor:
    """The logits (positions, vocabulary) that the model computes from last hidden states (positions, width). The
    model's own forward does it, with its body replaced by `output` holding these states: so every family's scaling and
    soft-capping of logits is applied as the family applies it."""
    body = body_of(causal)
    replaced, answer = body.__dict__.get("forward"), replace(output, last_hidden_state=hidden[None])
    body.forward = lambda *_, **__: answer
    try:
        positions = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        # Without its layers the model has no router's logits to add a loss of.
        routers = {"output_router_logits": False} if hasattr(causal.config, "output_router_logits") else {}
        return causal(input_ids=positions, use_cache=False, **routers).logits.squeeze(0)
    finally:
        if replaced is None:
            del body.forward
        else:
            body.forward = replaced


def is_causal(model: Any, input_ids: Tensor, tolerance: float = EXACT) -> bool:
    """Whether the logits before the last token of one row stay the same when that token changes."""
    other = input_ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad(), plain_attention(causal_of(model)):
        one, two = (model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in (input_ids, other))
    return bool((one - two).abs().max() <= tolerance * one.abs().max().clamp(min=1.0)) or not one.isfinite().all()


def full_logits_loss(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of some rows as the model's own full logits give it."""
    with plain_attention(causal_of(model)):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def losses_agree(loss: Tensor, expected: Tensor, count: int, tolerance: float = EXACT) -> bool:
    """Whether two sums over `count` tokens are the same but for rounding. Nothing is expected where one overflows."""
    agree = torch.isclose(loss, expected, rtol=tolerance, atol=tolerance * max(count, 1))
    return bool(agree) or not torch.isfinite(expected)
