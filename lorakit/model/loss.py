"""The supervised-only loss: the language-model head is computed where a token is trained, in chunks, nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lorakit.model.shared_prefix import body_of, body_output, causal_of

# How far two ways to one number may differ, as a share, by the arithmetic: float32, or half precision.
EXACT, HALF = 1e-4, 2e-2

IGNORED = -100  # torch's ignore_index: the label of a token that is not trained

# Logits held at once, in numbers: 128 MiB in float32.
_CHUNK_LOGITS = 1 << 25


def supervised_loss(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """The summed cross-entropy of all trained tokens, in float32, and their number.

    Args:
        model: a causal language model, or a PEFT model around one.
        input_ids, attention_mask, labels: (rows, tokens); labels are -100 where nothing is trained. The label at
            position t is predicted from what stands before it.
        position_ids: (rows, tokens) of packed rows, beginning anew with each; `attention_mask` is then None.
    """
    causal = causal_of(model)
    output, skipped = body_output(causal, input_ids, attention_mask, labels, IGNORED, position_ids)
    targets = labels[:, 1 + skipped :]
    trained = targets != IGNORED
    hidden, targets = output.last_hidden_state[:, :-1][trained], targets[trained]
    chunk = max(1, _CHUNK_LOGITS // causal.config.get_text_config().vocab_size)
    total = hidden.sum().float() * 0.0  # keeps a batch without trained tokens connected to the weights
    for chunk_hidden, chunk_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        arguments = (causal, output, chunk_hidden, chunk_targets)
        if len(targets) > chunk and torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False)
        else:
            total = total + _chunk_loss(*arguments)
    return total, len(targets)


def _chunk_loss(causal: Any, output: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _CrossEntropy.apply(head_logits(causal, output, hidden), targets)


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in float32, with its gradient made in the forward pass: one pass over the logits instead of
    four, which on a CPU is a tenth of a training step."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = logits.float()
        normalizer = wide.logsumexp(-1)
        loss = (normalizer - wide.gather(-1, targets[:, None])[:, 0]).sum()
        if ctx.needs_input_grad[0]:
            gradient = torch.sub(wide, normalizer[:, None]).exp_()
            gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
            ctx.save_for_backward(gradient.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale.to(gradient.dtype)), None  # nobody reads it again


def head_logits(causal: Any, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The logits (positions, vocabulary) that the model computes from last hidden states (positions, width).

    The model's own forward does it, with its body replaced by `output` holding these states: so every family's scaling
    and soft-capping of logits is applied as the family applies it.
    """
    with _body_answers(body_of(causal), replace(output, last_hidden_state=hidden[None])):
        positions = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        # Without its layers the model has no router's logits to add a loss of.
        routers = {"output_router_logits": False} if hasattr(causal.config, "output_router_logits") else {}
        return causal(input_ids=positions, use_cache=False, **routers).logits.squeeze(0)


@contextmanager
def _body_answers(body: Any, output: Any) -> Iterator[None]:
    """Within this, calling `body` gives `output` and computes nothing."""
    own = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


def is_causal(model: Any, input_ids: torch.Tensor, tolerance: float = EXACT) -> bool:
    """Whether the logits before the last token of one row stay the same when that token changes."""
    other = input_ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        one, two = (model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in (input_ids, other))
    return bool((one - two).abs().max() <= tolerance * one.abs().max().clamp(min=1.0)) or not one.isfinite().all()


def loss_agrees(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    tolerance: float = EXACT,
) -> bool:
    """Whether the supervised-only loss of some rows equals what the model's own full logits give."""
    with torch.no_grad():
        total, count = supervised_loss(model, input_ids, attention_mask, labels)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        expected = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return _agree(total, expected, count, tolerance)


def packing_agrees(
    model: Any, packed: dict[str, torch.Tensor], apart: dict[str, torch.Tensor], tolerance: float = EXACT
) -> bool:
    """Whether rows have the same loss in one pack as one by one: else they see each other, or where they stand."""
    with torch.no_grad():
        in_a_pack, count = supervised_loss(model, attention_mask=None, **packed)
        expected, _ = supervised_loss(model, **apart)
    return _agree(in_a_pack, expected, count, tolerance)


def _agree(loss: torch.Tensor, expected: torch.Tensor, count: int, tolerance: float) -> bool:
    agree = torch.isclose(loss, expected, rtol=tolerance, atol=tolerance * max(count, 1))
    return bool(agree) or not torch.isfinite(expected)
