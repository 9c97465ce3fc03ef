"""The proof of a merge: the same rows through the adapter model and through the merged files, compared.

A model may read its weights anew in each forward (lorakit.model.layerwise), so rows go through in few, large batches,
and its head is run on the trained positions of all rows at once. Several processes share the rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from scipy.special import stdtrit

from lorakit.amounts import percent
from lorakit.data.batches import collate
from lorakit.distributed.processes import gather, on_first, together
from lorakit.distributed.sharing import own_share
from lorakit.errors import UserError
from lorakit.model.loss import body_of, causal_of, head_logits
from lorakit.model.trained_tokens import IGNORED
from lorakit.progress import Progress

Row = dict[str, Any]

# Logits saved of a model that others are compared with: 128 MiB in float32, or the logits of so many positions.
_SAVED_LOGITS, _SAVED_POSITIONS = 1 << 25, 512
_COMPARED_LOGITS = 1 << 20  # at once, in float64
# Logits that the head makes at once, or those of so many positions: each time it may be read anew.
_HEAD_LOGITS, _HEAD_POSITIONS = 1 << 23, 128
# Numbers in a batch's hidden states, of which a block makes some ten times as many; and in its attention scores.
_STATES, _SCORES = 1 << 21, 1 << 25


@dataclass(frozen=True)
class Tolerance:
    """What a merge must hold: rounding once to the stored type is all that may separate the two models. `logit` is a
    share of the largest logit; a near tie is two logits closer than `tie`."""

    logit: float | None
    kl: float
    top1: float
    tie: float


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

    def figures(self) -> dict[str, Any]:
        """The figures over all rows, by name."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("row_")}

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What does not hold, each with its figure."""
        difference, scale, agreement = self.max_logit_difference, self.logit_scale, self.top1_agreement_beyond_ties
        for whose, figure in (("adapter model's own", scale), ("merged model's", difference)):
            if not math.isfinite(figure):
                return [f"the {whose} logits are not all finite numbers"]
        failures = []
        if tolerance.logit is not None and not difference <= tolerance.logit * scale:
            failures.append(
                f"a logit differs by {difference:.3g}, over {tolerance.logit:g} of the largest ({scale:.3g})"
            )
        if not self.mean_kl <= tolerance.kl:
            failures.append(f"mean KL is {self.mean_kl:.3g} nats, over {tolerance.kl:g}")
        if not agreement >= tolerance.top1:
            failures.append(f"top-1 agreement is {percent(agreement, 2)}, under {tolerance.top1:.1%}")
        return failures

    def loss_difference(self) -> tuple[float, float, float]:
        """Merged loss minus adapter loss in nats a position, and the ends of its 95 % interval over rows.

        The rows are the sample and are paired: the difference is the ratio of two sums over rows (of summed losses, of
        positions), its standard error that of the linearized ratio (Cochran, Sampling Techniques, chapter 6), taken
        times Student's t. With one row the interval is infinite.
        """
        weights, adapter, merged = (
            torch.tensor(of_rows, dtype=torch.float64)
            for of_rows in (self.row_positions, self.row_adapter_losses, self.row_merged_losses)
        )
        summed = (merged - adapter) * weights
        difference = float(summed.sum() / weights.sum())
        degrees = len(weights) - 1
        if not degrees:
            return difference, -math.inf, math.inf
        variance = float((summed - difference * weights).square().sum()) * len(weights) / degrees
        half = float(stdtrit(degrees, 0.975)) * math.sqrt(variance) / float(weights.sum())
        return difference, difference - half, difference + half

    def better(self) -> Literal["adapter", "merged", "cannot tell"]:
        """Which model has the lower loss on rows like these: told where the interval of `loss_difference` leaves out
        zero."""
        _, low, high = self.loss_difference()
        return "adapter" if low > 0 else "merged" if high < 0 else "cannot tell"


@dataclass(frozen=True)
class ReferenceLogits:
    """What a model predicts at the trained positions of the rows that this process computes, on the CPU."""

    rows: list[Row]  # of all processes
    batches: list[list[int]]  # rows that are computed at once, by their index: those of this process
    logits: torch.Tensor  # (positions, vocabulary), float32, in the order of the batches
    scale: float  # the largest logit's absolute value, of all processes


def compute_reference(model: Any, rows: Sequence[Row], pad_token_id: int, progress: Progress) -> ReferenceLogits:
    """What the adapter model predicts on the first rows, as many as may be saved: by the rows and the vocabulary alone.
    Rows that train nothing are left out, and a first row that is longer is cut. A UserError if no row trains. The rows
    are those of the first process; the model is None on a process that leaves them to the others."""
    first = on_first(lambda: _rows_to_compare(rows, causal_of(model).config.get_text_config().vocab_size))
    share = own_share([len(row["input_ids"]) for row in first], model is not None)

    def predict() -> tuple[list[list[int]], torch.Tensor, float]:
        if not share:
            return [], torch.empty(0), 0.0
        lengths = [len(first[index]["input_ids"]) for index in share]
        batches = [[share[at] for at in batch] for batch in _split_rows(lengths, causal_of(model).config)]
        _, _, pieces = _predict(model, first, batches, pad_token_id, progress, "adapter model")
        logits = torch.cat([piece for _, piece in pieces])
        least, most = torch.aminmax(logits)
        return batches, logits, float(torch.maximum(-least, most))

    batches, logits, scale = together(predict)
    largest = torch.tensor(gather(scale), dtype=torch.float64).amax()  # NaN where one is
    return ReferenceLogits(first, batches, logits, float(largest))


def _rows_to_compare(rows: Sequence[Row], vocabulary: int) -> list[Row]:
    first = _first_rows(rows, max(_SAVED_LOGITS // vocabulary, _SAVED_POSITIONS))
    if not first:
        raise UserError("no row trains a token, so there is nothing to compare the models on.")
    return first


def compare(
    expected: Sequence[ReferenceLogits], merged: Any, pad_token_id: int, tie: float, progress: Progress
) -> list[Proof]:
    """One model against what each of several predicted on the same rows. `tie` is a share of the largest logit."""
    rows, batches = expected[0].rows, expected[0].batches

    def measure() -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The rows that this process's positions are of (positions,), and their figures, against each."""
        if not batches:
            return torch.empty(0, dtype=torch.long), [torch.empty(0, 6, dtype=torch.float64)] * len(expected)
        targets, row_of, pieces = _predict(merged, rows, batches, pad_token_id, progress, "merged model")
        figures = [
            [_figures(one.logits[here], logits, targets[here], tie * one.scale) for one in expected]
            for here, logits in pieces
        ]
        return row_of, [torch.cat(collected) for collected in zip(*figures, strict=True)]

    row_of, figures = zip(*gather(together(measure)), strict=True)
    rows_of_all = torch.cat(row_of)
    order = rows_of_all.argsort(stable=True)  # by rows, however many processes computed them
    of_each = zip(expected, zip(*figures, strict=True), strict=True)
    return [_proof(one, torch.cat(collected)[order], rows_of_all[order]) for one, collected in of_each]


@torch.inference_mode()
def _figures(expected: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, gap: float) -> torch.Tensor:
    """The differences of two models' logits (positions, vocabulary), (positions, 6): largest difference, KL, whether
    the likeliest token is the same, whether it is or nearly is (two logits within `gap`), and the loss of both.

    In float64, since KLs are near float32's rounding. NaN in, NaN out.
    """
    pieces = []
    step = max(1, _COMPARED_LOGITS // expected.shape[1])
    for one, other, target in zip(expected.split(step), logits.split(step), targets.split(step), strict=True):
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
    counts = torch.bincount(row_of, minlength=len(expected.rows))
    row_losses = figures.new_zeros(len(expected.rows), 2).index_add(0, row_of, figures[:, 4:]) / counts[:, None]
    means: Any = figures[:, 1:].mean(0).tolist()
    by_row: Any = (tuple(column) for column in (counts.tolist(), *row_losses.T.tolist()))
    return Proof(len(expected.rows), len(figures), float(figures[:, 0].max()), expected.scale, *means, *by_row)


def _first_rows(rows: Sequence[Row], limit: int) -> list[Row]:
    """The first rows whose trained positions stay within the limit, those without any left out."""
    first: list[Row] = []
    left = limit
    for row in rows:
        trained = [at for at, label in enumerate(row["labels"]) if at and label != IGNORED]
        if first and len(trained) > left:
            break
        if trained:
            end = trained[limit] if len(trained) > limit else len(row["labels"])
            first.append({key: row[key][:end] for key in ("input_ids", "labels")})
            left -= len(trained)
    return first


def _split_rows(lengths: list[int], config: Any) -> list[list[int]]:
    """As few batches as keep a pass over them small, each of rows of about one length, by their index."""
    text = config.get_text_config()
    heads = (getattr(text, "num_attention_heads", 0) or 0) if config._attn_implementation == "eager" else 0
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else math.inf
        tokens = longest * (len(batches[-1]) + 1 if batches else 1)
        if tokens * text.hidden_size <= _STATES and tokens * longest * heads <= _SCORES:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _predict(
    model: Any, rows: list[Row], batches: list[list[int]], pad_token_id: int, progress: Progress, name: str
) -> tuple[torch.Tensor, torch.Tensor, Iterator[tuple[slice, torch.Tensor]]]:
    """The trained tokens of all batches (positions), the rows that they are of (positions), and their logits
    (positions, vocabulary), float32 on the CPU, some positions at a time, with which these are."""
    causal = causal_of(model)
    hidden, targets, row_of, output = [], [], [], None
    with progress.bar(f"{name} on the rows", total=sum(map(len, batches))) as bar, torch.inference_mode():
        for batch in batches:
            tensors = collate([rows[index] for index in batch], pad_token_id)
            labels = tensors.pop("labels")[:, 1:]
            trained = labels != IGNORED
            given = {key: value.to(causal.device) for key, value in tensors.items()}
            output = body_of(causal)(**given, use_cache=False)
            hidden.append(output.last_hidden_state[:, :-1][trained.to(causal.device)].cpu())
            targets.append(labels[trained])
            row_of.append(torch.tensor(batch)[trained.nonzero()[:, 0]])
            bar.advance(len(batch))
    states, vocabulary = torch.cat(hidden), causal.config.get_text_config().vocab_size

    @torch.inference_mode()
    def logits() -> Iterator[tuple[slice, torch.Tensor]]:
        step = max(_HEAD_LOGITS // vocabulary, _HEAD_POSITIONS)
        for start in range(0, len(states), step):
            here = slice(start, start + step)
            yield here, head_logits(causal, output, states[here].to(causal.device)).float().cpu()

    return torch.cat(targets), torch.cat(row_of), logits()
