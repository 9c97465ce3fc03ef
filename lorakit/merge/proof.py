"""The proof of a merge: the same rows through the adapter model and through the merged files, compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div

from lorakit.model.loss import IGNORED, head_logits
from lorakit.progress import Progress

# Logits kept of the adapter model, in numbers: 512 MiB in float32.
_KEPT_LOGITS = 1 << 27


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
    """The adapter model's logits (positions, vocabulary) at the trained positions of some rows, on the CPU."""

    rows: list[dict[str, Any]]
    logits: torch.Tensor
    targets: torch.Tensor


def reference(model: Any, rows: Sequence[dict[str, Any]], progress: Progress) -> Reference:
    """What the adapter model predicts on as many of the rows, from the first on, as fit into memory."""
    vocabulary = model.config.get_text_config().vocab_size
    chosen: list[dict[str, Any]] = []
    logits, targets, held = [], [], 0
    with progress.bar("adapter model on held-out rows", total=len(rows)) as bar:
        for row in rows:
            some_logits, some_targets = _predictions(model, row)
            held += len(some_targets) * vocabulary
            if chosen and held > _KEPT_LOGITS:
                bar.advance(len(rows) - len(chosen))
                break
            chosen.append(row)
            logits.append(some_logits)
            targets.append(some_targets)
            bar.advance()
    return Reference(chosen, torch.cat(logits), torch.cat(targets))


def compare(expected: Reference, merged: Any, tie: float, progress: Progress) -> Proof:
    """The merged model against what the adapter model predicted."""
    at, difference, kl, agree, near, loss = 0, 0.0, 0.0, 0, 0, 0.0
    scale = float(expected.logits.abs().max())
    with progress.bar("merged model on the same rows", total=len(expected.rows)) as bar:
        for row in expected.rows:
            found, targets = _predictions(merged, row)
            wanted = expected.logits[at : at + len(found)]
            at += len(found)
            difference = max(difference, float((found - wanted).abs().max()))
            kl += float(kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True))
            best, other = wanted.argmax(-1), found.argmax(-1)
            gap = wanted.gather(1, best[:, None]) - wanted.gather(1, other[:, None])
            agree += int((best == other).sum())
            near += int(((best == other) | (gap[:, 0] <= tie * scale)).sum())
            loss += float(cross_entropy(found, targets, reduction="sum"))
            bar.advance()
    return Proof(
        rows=len(expected.rows),
        positions=at,
        max_logit_difference=difference,
        logit_scale=scale,
        mean_kl=kl / at,
        top1_agreement=agree / at,
        top1_agreement_beyond_ties=near / at,
        adapter_loss=float(cross_entropy(expected.logits, expected.targets)),
        merged_loss=loss / at,
    )


def _predictions(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits before each trained token of a row, and these tokens."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.tensor([row["input_ids"]], device=causal.device)
    targets = torch.tensor(row["labels"][1:])
    trained = targets != IGNORED
    with torch.inference_mode():
        output = causal.get_decoder()(input_ids=ids, use_cache=False)
        hidden = output.last_hidden_state[0, :-1][trained.to(causal.device)]
        return head_logits(causal, output, hidden).float().cpu(), targets[trained]
