"""The proof of a merge: the same rows through the adapter model and through the merged files, compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div

from lorakit.data.batches import collate, split_batch
from lorakit.model.loss import IGNORED, head_logits
from lorakit.model.prefix import body_of
from lorakit.progress import Progress

# Logits kept of the adapter model, in numbers: 256 MiB in float32.
_KEPT_LOGITS = 1 << 26
_ROWS = 8


@dataclass(frozen=True)
class Tolerance:
    """What a merge must hold. `logit` is a share of the largest logit; a near tie is two logits closer than `tie`."""

    logit: float | None
    kl: float
    top1: float
    tie: float


# Rounding once to the stored type is all that may separate the two models.
TOLERANCES = {
    "float32": Tolerance(logit=1e-4, kl=1e-6, top1=1.0, tie=1e-4),
    "float16": Tolerance(logit=None, kl=1e-3, top1=0.995, tie=2**-10),
    "bfloat16": Tolerance(logit=None, kl=1e-3, top1=0.995, tie=2**-7),
}


@dataclass(frozen=True)
class Proof:
    """How far two models' predictions lie apart at the trained positions of the same rows.

    Logit differences are absolute; `logit_scale` is the adapter model's largest. KL is in nats, adapter to merged.
    """

    rows: int
    positions: int
    max_logit_difference: float
    logit_scale: float
    mean_kl: float
    top1_agreement: float
    top1_agreement_beyond_ties: float
    adapter_loss: float
    merged_loss: float

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What does not hold, each with its figure."""
        found = []
        if tolerance.logit is not None and self.max_logit_difference > tolerance.logit * self.logit_scale:
            found.append(
                f"a logit differs by {self.max_logit_difference:.3g}, over {tolerance.logit:g} of the largest "
                f"({self.logit_scale:.3g})"
            )
        if not self.mean_kl <= tolerance.kl:
            found.append(f"mean KL is {self.mean_kl:.3g} nats, over {tolerance.kl:g}")
        if not self.top1_agreement_beyond_ties >= tolerance.top1:
            found.append(f"top-1 agreement is {self.top1_agreement_beyond_ties:.2%}, under {tolerance.top1:.1%}")
        return found


@dataclass(frozen=True)
class Reference:
    """The adapter model's logits (positions, vocabulary) at the trained positions of batches of rows, on the CPU."""

    batches: list[list[dict[str, Any]]]
    logits: list[torch.Tensor]
    targets: list[torch.Tensor]


def reference(model: Any, rows: Sequence[dict[str, Any]], pad_token_id: int, progress: Progress) -> Reference:
    """What the adapter model predicts on as many of the rows, from the first on, as fit into memory."""
    vocabulary = model.config.get_text_config().vocab_size
    positions = 0
    chosen: list[dict[str, Any]] = []
    for row in rows:
        positions += sum(label != IGNORED for label in row["labels"])
        if chosen and positions * vocabulary > _KEPT_LOGITS:
            break
        chosen.append(row)
    batches = split_batch(chosen, _ROWS)
    logits, targets = [], []
    with progress.bar("adapter model on held-out rows", total=len(chosen)) as bar:
        for batch in batches:
            some_logits, some_targets = _predictions(model, batch, pad_token_id)
            logits.append(some_logits)
            targets.append(some_targets)
            bar.advance(len(batch))
    return Reference(batches, logits, targets)


def compare(expected: Reference, merged: Any, pad_token_id: int, tie: float, progress: Progress) -> Proof:
    """The merged model against what the adapter model predicted. `tie` is a share of the largest logit."""
    difference, kl, agree, near, merged_loss, adapter_loss = 0.0, 0.0, 0, 0, 0.0, 0.0
    scale = max(float(logits.abs().max()) for logits in expected.logits)
    positions, rows = sum(map(len, expected.targets)), sum(map(len, expected.batches))
    with progress.bar("merged model on the same rows", total=rows) as bar:
        for batch, wanted in zip(expected.batches, expected.logits, strict=True):
            found, targets = _predictions(merged, batch, pad_token_id)
            difference = max(difference, float((found - wanted).abs().max()))
            kl += float(kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True))
            best, other = wanted.argmax(-1), found.argmax(-1)
            gap = (wanted.gather(1, best[:, None]) - wanted.gather(1, other[:, None]))[:, 0]
            agree += int((best == other).sum())
            near += int(((best == other) | (gap <= tie * scale)).sum())
            merged_loss += float(cross_entropy(found, targets, reduction="sum"))
            adapter_loss += float(cross_entropy(wanted, targets, reduction="sum"))
            bar.advance(len(batch))
    return Proof(
        rows=rows,
        positions=positions,
        max_logit_difference=difference,
        logit_scale=scale,
        mean_kl=kl / positions,
        top1_agreement=agree / positions,
        top1_agreement_beyond_ties=near / positions,
        adapter_loss=adapter_loss / positions,
        merged_loss=merged_loss / positions,
    )


def _predictions(model: Any, batch: list[dict[str, Any]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits (positions, vocabulary) before each trained token of the rows, and these tokens."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = collate(batch, pad_token_id)
    targets = tensors.pop("labels")[:, 1:]
    trained = targets != IGNORED
    with torch.inference_mode():
        output = body_of(causal)(**{k: v.to(causal.device) for k, v in tensors.items()}, use_cache=False)
        hidden = output.last_hidden_state[:, :-1][trained.to(causal.device)]
        return head_logits(causal, output, hidden).float().cpu(), targets[trained]
