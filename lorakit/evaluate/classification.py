"""Classification by likelihood: the labels of rows; accuracy, F1, AUC and calibration of their log-likelihoods."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from lorakit.data.answers import reference_of, until_stop
from lorakit.data.dataset import Examples
from lorakit.evaluate.metric import Measure, mean, ratio
from lorakit.evaluate.rendering import RenderedRows

FORMAT = "classification"
BINS = 15
"""Bins of equal width in which confidence and accuracy are compared (Guo et al., arXiv 1706.04599)."""

# With more different answers than this, rows are texts rather than a classification.
_MOST_LABELS = 256


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one task, as texts and token ids; the numbers of its rows, and the position of each one's label."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    rows: list[int]
    truth: list[int]


def labels_of(rendered: RenderedRows, train: Examples | None = None) -> dict[str, Labels]:
    """The labels of each task, by its tag ("" if it has none): all answers that its rows have. `train`: training rows,
    whose answers are labels too. A label's tokens end before the stop token, as lm-eval's do. If the tokens of one
    label begin another's, all include it: the shorter one could not be told from its beginning."""
    rows_of_task: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rendered.rows):
        if rendered.sources[row["source"]].format == FORMAT and row["answer"] >= 0:
            rows_of_task[rendered.tags[number]].append(number)
    of_train = _training_answers(train, any(rendered.tags)) if train is not None and rows_of_task else {}
    labels, stops = dict[str, Labels](), rendered.stop_ids
    for task, numbers in rows_of_task.items():
        answers, seen = dict[str, tuple[int, ...]](), set[tuple[int, ...]]()
        for row in chain((rendered.rows[number] for number in numbers), of_train.get(task, {}).values()):
            answer = tuple(row["input_ids"][row["answer"] :])  # with the tokens that end it
            if answer not in seen:
                seen.add(answer)
                answers.setdefault(reference_of(row, rendered.tokenizer, stops), answer)
        if not (2 <= len(answers) <= _MOST_LABELS and all(answers.values())):
            continue
        texts = tuple(sorted(answers))
        tokens = [tuple(until_stop(list(answers[text]), stops)) for text in texts]
        if any(one != other and other[: len(one)] == one for one in tokens for other in tokens):
            tokens = [answers[text][: len(label) + 1] for text, label in zip(texts, tokens, strict=True)]
        truth = [texts.index(reference_of(rendered.rows[number], rendered.tokenizer, stops)) for number in numbers]
        labels[task] = Labels(texts, tuple(tokens), numbers, truth)
    return labels


def _training_answers(train: Examples, by_task: bool) -> dict[str, dict[tuple[int, ...], Any]]:
    """Of each task, or of all rows, a row of each different answer, by the answer's tokens."""
    classified = {at for at, one in enumerate(train.report.sources) if one.format == FORMAT}
    answers: dict[str, dict[tuple[int, ...], Any]] = defaultdict(dict)
    for row in train.rows if classified else ():
        if row["source"] in classified:
            answers[row["task"] if by_task else ""].setdefault(tuple(row["input_ids"][row["answer"] :]), row)
    return answers


@dataclass(frozen=True, eq=False)
class LabelScores:
    """Scores of a classification by likelihood. `auc`: the area under the ROC curve of the second of two labels, or the
    mean over labels of each against the rest; None if all rows have one label. `confusion` (true label, predicted
    label) counts rows. `ece`: the expected calibration error. `measures`: `accuracy`, `accuracy-norm` and
    `accuracy-bytes` are lm-eval's acc, acc_norm and acc_bytes: by log-likelihood as it is, per character, per UTF-8
    byte; `macro-f1`: the mean F1 of the labels that are true or predicted in some row; `brier`: the mean squared
    distance of all labels' probabilities from the truth."""

    labels: tuple[str, ...]
    auc: float | None
    confusion: np.ndarray
    ece: float
    measures: dict[str, Measure]

    def to_dict(self) -> dict[str, Any]:
        """What has no interval, as the files have it."""
        plain = {"labels": list(self.labels), "confusion": self.confusion.tolist()}
        return plain | {"auc": self.auc, "expected_calibration_error": self.ece}


def score_labels(loglikelihoods: np.ndarray, truth: Sequence[int], labels: Sequence[str]) -> LabelScores:
    """Scores of log-likelihoods (rows, labels) in nats against the position of each row's true label."""
    from sklearn.metrics import confusion_matrix

    def macro_f1(sums: np.ndarray) -> np.ndarray:
        """From sums (..., 2 x labels): twice the hits of each label, then how often it is true or predicted."""
        return np.nanmean(ratio(np.stack(np.split(sums, 2, axis=-1), axis=-1)), axis=-1)

    likely, true = np.asarray(loglikelihoods, dtype=float), np.asarray(truth, dtype=int)
    predicted = likely.argmax(1)
    odds = np.exp(likely - likely.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    is_true, is_predicted = np.eye(len(labels))[true], np.eye(len(labels))[predicted]
    characters, octets = ([max(len(text), 1) for text in of] for of in (labels, [label.encode() for label in labels]))
    by_length = {"accuracy": likely, "accuracy-norm": likely / characters, "accuracy-bytes": likely / octets}
    measures = {name: mean((scores.argmax(1) == true).astype(float)) for name, scores in by_length.items()}
    f1_counts = np.concatenate([2 * is_true * is_predicted, is_true + is_predicted], axis=1)
    measures["macro-f1"] = Measure(f1_counts, macro_f1)
    measures["brier"] = mean(((probabilities - is_true) ** 2).sum(1), unit="ratio", higher=False)
    confusion = confusion_matrix(true, predicted, labels=range(len(labels)))
    ece = expected_calibration_error(probabilities, true)
    return LabelScores(tuple(labels), _auc(probabilities, true), confusion, ece, measures)


def _auc(probabilities: np.ndarray, true: np.ndarray) -> float | None:
    """Leaves out labels that no row has, or all rows have: they have no curve."""
    from sklearn.metrics import roc_auc_score

    labels = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    mixed = [label for label in labels if 0 < int((true == label).sum()) < len(true)]
    curves = [roc_auc_score(true == label, probabilities[:, label]) for label in mixed]
    return float(np.mean(curves)) if curves else None


def expected_calibration_error(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The mean over rows of |accuracy - confidence| of their bin; bins are (0, 1/15], (1/15, 2/15] and so on."""
    confidence = probabilities.max(1)
    right = (probabilities.argmax(1) == truth).astype(float)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(truth))
