"""What the log-likelihoods of labels say: accuracy, macro F1, AUC, the confusion matrix, and calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.errors import UserError
from lorakit.evaluate.metric import Measure, mean, ratio

BINS = 15
"""Bins of equal width in which confidence and accuracy are compared (Guo et al., arXiv 1706.04599)."""


@dataclass(frozen=True, eq=False)
class Classification:
    """Scores of a classification by likelihood.

    `accuracy` takes the most likely label. `accuracy_norm` divides each log-likelihood by the label's characters
    first, and `accuracy_bytes` by its UTF-8 bytes, so that long labels are not at a disadvantage: lm-eval's acc,
    acc_norm and acc_bytes. `macro_f1`: the mean F1 of the labels that are true or predicted in some row. `auc`: the
    area under the ROC curve of the second of two labels, or the mean over labels of each against the rest; None where
    all rows have one label. `confusion` (true label, predicted label) counts rows.

    Calibration takes the label's probability among the labels (softmax of the log-likelihoods). `ece`, the expected
    calibration error: the mean distance of confidence and accuracy over 15 bins of equal width, weighted by rows; it
    is biased upwards where bins hold few rows. `brier`: the mean squared distance of all labels' probabilities from
    the truth, summed over labels as lm-eval does, from 0 to 2.

    `measures`: those with an interval, for lorakit.evaluate.intervals.
    """

    labels: tuple[str, ...]
    predicted: np.ndarray
    accuracy: float
    accuracy_norm: float
    accuracy_bytes: float
    macro_f1: float
    auc: float | None
    confusion: np.ndarray
    ece: float
    brier: float
    measures: dict[str, Measure]


def classification(loglikelihoods: np.ndarray, truth: Sequence[int], labels: Sequence[str]) -> Classification:
    """Scores of log-likelihoods (rows, labels) in nats against the position of each row's true label.

    Raises:
        UserError: there are no rows, or a true label is none of the labels.
    """
    from sklearn.metrics import confusion_matrix, f1_score

    likely, true = np.asarray(loglikelihoods, dtype=float), np.asarray(truth, dtype=int)
    if not len(true):
        raise UserError("classification: there are no rows to score. Write data.eval, or more --rows.")
    if true.min() < 0 or true.max() >= len(labels):
        wrong = int(np.flatnonzero((true < 0) | (true >= len(labels)))[0])
        raise UserError(
            f"classification: row {wrong + 1} has label {true[wrong]}, and there are {len(labels)}, from 0 to "
            f"{len(labels) - 1}. Name all labels in data.format."
        )
    predicted = likely.argmax(1)
    odds = np.exp(likely - likely.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    squared = ((probabilities - np.eye(len(labels))[true]) ** 2).sum(1)
    measures = {
        "accuracy": mean((predicted == true).astype(float)),
        "accuracy-norm": mean(_right(likely, true, [len(label) for label in labels])),
        "accuracy-bytes": mean(_right(likely, true, [len(label.encode()) for label in labels])),
        "macro-f1": Measure(_f1_counts(true, predicted, len(labels)), _macro_f1),
        "brier": mean(squared, unit="ratio", higher=False),
    }
    return Classification(
        tuple(labels),
        predicted,
        measures["accuracy"].value,
        measures["accuracy-norm"].value,
        measures["accuracy-bytes"].value,
        float(f1_score(true, predicted, average="macro", zero_division=0)),
        _auc(probabilities, true),
        confusion_matrix(true, predicted, labels=range(len(labels))),
        expected_calibration_error(probabilities, true),
        measures["brier"].value,
        measures,
    )


def expected_calibration_error(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The mean over rows of |accuracy - confidence| of their bin; bins are (0, 1/15], (1/15, 2/15] and so on."""
    confidence = probabilities.max(1)
    right = (probabilities.argmax(1) == truth).astype(float)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(truth))


def _right(likely: np.ndarray, true: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """1 where the likelihood over the label's length is highest for the true label."""
    return ((likely / np.maximum(lengths, 1)).argmax(1) == true).astype(float)


def _auc(probabilities: np.ndarray, true: np.ndarray) -> float | None:
    """Labels that no row has, or all rows have, have no curve and are left out."""
    from sklearn.metrics import roc_auc_score

    labels = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    curves = [
        roc_auc_score(true == label, probabilities[:, label])
        for label in labels
        if 0 < int((true == label).sum()) < len(true)
    ]
    return float(np.mean(curves)) if curves else None


def _f1_counts(true: np.ndarray, predicted: np.ndarray, labels: int) -> np.ndarray:
    """Per row (rows, 2 x labels): twice the hits of each label, then how often it is true or predicted."""
    is_true, is_predicted = np.eye(labels)[true], np.eye(labels)[predicted]
    return np.concatenate([2 * is_true * is_predicted, is_true + is_predicted], axis=1)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    hits, seen = np.split(sums, 2, axis=-1)
    each = ratio(np.stack([hits, seen], axis=-1))  # NaN for a label that is neither true nor predicted
    return np.nanmean(each, axis=-1)
