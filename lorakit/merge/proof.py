"""The proof of a merge: the same rows through the adapter model and through the merged files, compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lorakit.amounts import percent
from lorakit.errors import UserError
from lorakit.merge.predictions import Row, batches_of, causal_of, first_rows, logits_of, states_of
from lorakit.progress import Progress

# Logits kept of a model that others are compared with: 128 MiB in float32, or the logits of so many positions.
_KEPT_LOGITS, _KEPT_POSITIONS = 1 << 25, 512
_COMPARED_LOGITS = 1 << 20  # at once, in float64

# Student's t at 97.5 % for 1 to 4 degrees of freedom.
_FEW_DEGREES = (12.7062, 4.3027, 3.1824, 2.7764)


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
    Losses are means over positions, in nats; of each row there are its trained positions and its two losses.
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
    row_positions: tuple[int, ...] = ()
    row_adapter_losses: tuple[float, ...] = ()
    row_merged_losses: tuple[float, ...] = ()

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What does not hold, each with its figure."""
        if not math.isfinite(self.logit_scale):
            return ["the adapter model's own logits are not all finite numbers"]
        if not math.isfinite(self.max_logit_difference):
            return ["the merged model's logits are not all finite numbers"]
        found = []
        if tolerance.logit is not None and not self.max_logit_difference <= tolerance.logit * self.logit_scale:
            found.append(
                f"a logit differs by {self.max_logit_difference:.3g}, over {tolerance.logit:g} of the largest "
                f"({self.logit_scale:.3g})"
            )
        if not self.mean_kl <= tolerance.kl:
            found.append(f"mean KL is {self.mean_kl:.3g} nats, over {tolerance.kl:g}")
        if not self.top1_agreement_beyond_ties >= tolerance.top1:
            found.append(
                f"top-1 agreement is {percent(self.top1_agreement_beyond_ties, 2)}, under {tolerance.top1:.1%}"
            )
        return found

    def loss_difference(self) -> tuple[float, float, float]:
        """Merged loss minus adapter loss in nats a position, and the ends of its 95 % interval over rows.

        The rows are the sample and are paired: the difference is the ratio of two sums over rows (of summed losses, of
        positions), its standard error that of the linearized ratio (Cochran, Sampling Techniques, chapter 6), taken
        times Student's t. With one row the interval is infinite.
        """
        weights = torch.tensor(self.row_positions, dtype=torch.float64)
        ours, theirs = (
            torch.tensor(losses, dtype=torch.float64) for losses in (self.row_adapter_losses, self.row_merged_losses)
        )
        apart = (theirs - ours) * weights
        difference = float(apart.sum() / weights.sum())
        if len(weights) < 2:
            return difference, -math.inf, math.inf
        residuals = apart - difference * weights
        variance = float(residuals.square().sum()) * len(weights) / (len(weights) - 1)
        half = _student(len(weights) - 1) * math.sqrt(variance) / float(weights.sum())
        return difference, difference - half, difference + half

    def better(self) -> Literal["adapter", "merged", "cannot tell"]:
        """Which model has the lower loss on rows like these: told where the interval of `loss_difference`, paired and
        at 95 % over rows, leaves out zero."""
        _, low, high = self.loss_difference()
        return "adapter" if low > 0 else "merged" if high < 0 else "cannot tell"


def _student(degrees: int) -> float:
    """Student's t at 97.5 %; from five degrees on by its expansion about the normal's, within 0.2 %."""
    if degrees <= len(_FEW_DEGREES):
        return _FEW_DEGREES[degrees - 1]
    return 1.95996 + 2.37227 / degrees + 2.82250 / degrees**2 + 2.5558 / degrees**3


@dataclass(frozen=True)
class ReferenceLogits:
    """What a model predicts at the trained positions of rows: what others are compared with, on the CPU."""

    rows: list[Row]
    batches: list[list[int]]
    """The rows that are computed together, by their index."""
    logits: torch.Tensor
    """(positions, vocabulary), float32, in the order of the batches."""
    scale: float
    """The largest logit's absolute value."""


def compute_reference(
    model: Any, rows: Sequence[Row], pad_token_id: int, progress: Progress, name: str = "adapter model"
) -> ReferenceLogits:
    """What a model predicts on as many of the rows, from the first on, as may be kept; `name` is for the progress.

    It depends on the rows and the vocabulary alone how many these are. Rows that train nothing are left out, and a
    first row that is longer than that is cut.

    Raises:
        UserError: no row trains a token.
    """
    causal = causal_of(model)
    chosen = first_rows(rows, max(_KEPT_LOGITS // causal.config.get_text_config().vocab_size, _KEPT_POSITIONS))
    if not chosen:
        raise UserError("no row trains a token, so there is nothing to compare the models on.")
    batches = batches_of([len(row["input_ids"]) for row in chosen], causal.config)
    states = states_of(causal, chosen, batches, pad_token_id, progress, name)
    logits, at = torch.empty(0), 0
    for some in logits_of(causal, states):
        if at == 0:
            logits = torch.empty(len(states.targets), some.shape[1])
        logits[at : at + len(some)] = some
        at += len(some)
    least, most = torch.aminmax(logits)
    return ReferenceLogits(chosen, batches, logits, float(torch.maximum(-least, most)))


def compare(
    expected: Sequence[ReferenceLogits], merged: Any, pad_token_id: int, tie: float, progress: Progress
) -> list[Proof]:
    """One model against what each of several predicted on the same rows. `tie` is a share of the largest logit."""
    causal, first = causal_of(merged), expected[0]
    states = states_of(causal, first.rows, first.batches, pad_token_id, progress, "merged model")
    figures: list[list[torch.Tensor]] = [[] for _ in expected]
    at = 0
    for found in logits_of(causal, states):
        targets = states.targets[at : at + len(found)]
        for one, collected in zip(expected, figures, strict=True):
            collected.append(_figures(one.logits[at : at + len(found)], found, targets, tie * one.scale))
        at += len(found)
    return [_proof(one, torch.cat(collected), states.row_of) for one, collected in zip(expected, figures, strict=True)]


@torch.inference_mode()
def _figures(wanted: torch.Tensor, found: torch.Tensor, targets: torch.Tensor, gap: float) -> torch.Tensor:
    """What sets two models' logits (positions, vocabulary) apart, (positions, 6): largest difference, KL, whether the
    likeliest token is the same, whether it is or nearly is (two logits within `gap`), and the loss of both.

    In float64: a KL at float32's rounding is no difference. Not a number in, not a number out.
    """
    pieces = []
    step = max(1, _COMPARED_LOGITS // wanted.shape[1])
    for at in range(0, len(wanted), step):
        one, other, target = (part[at : at + step] for part in (wanted, found, targets))
        one, other = one.double(), other.double()
        difference = (one - other).abs().amax(1)
        best, second = one.argmax(1), other.argmax(1)
        short = (one.gather(1, best[:, None]) - one.gather(1, second[:, None]))[:, 0]
        one, other = one.log_softmax(1), other.log_softmax(1)
        kl = ((one - other) * one.exp()).sum(1)
        losses = [-logs.gather(1, target[:, None])[:, 0] for logs in (one, other)]
        same = best == second
        pieces.append(torch.stack([difference, kl, same.double(), (same | (short <= gap)).double(), *losses], 1))
    return torch.cat(pieces)


def _proof(expected: ReferenceLogits, figures: torch.Tensor, row_of: torch.Tensor) -> Proof:
    rows = len(expected.rows)
    counts = torch.bincount(row_of, minlength=rows)
    of_rows = figures.new_zeros(rows, 2).index_add(0, row_of, figures[:, 4:]) / counts[:, None]
    _, kl, same, near, ours, theirs = figures.mean(0).tolist()
    return Proof(
        rows=rows,
        positions=len(figures),
        max_logit_difference=float(figures[:, 0].max()),
        logit_scale=expected.scale,
        mean_kl=kl,
        top1_agreement=same,
        top1_agreement_beyond_ties=near,
        adapter_loss=ours,
        merged_loss=theirs,
        row_positions=tuple(counts.tolist()),
        row_adapter_losses=tuple(of_rows[:, 0].tolist()),
        row_merged_losses=tuple(of_rows[:, 1].tolist()),
    )
