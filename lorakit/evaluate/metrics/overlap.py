"""Metrics of texts by what answer and reference share: ROUGE, BLEU, chrF, and how long they are."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.evaluate.metrics.matching import tokens
from lorakit.registry import METRICS, Section


def _rouge(kind: str, answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], tokenizer=SimpleNamespace(tokenize=tokens))
    pairs = zip(answers, references, strict=True)
    return [{"": float(scorer.score(reference, answer)[kind].fmeasure)} for answer, reference in pairs]


@METRICS.register("rouge-1", batched=True)
def rouge_1(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE-1 (rouge-score, no stemming): F1 of the words that answer and reference share."""
    return _rouge("rouge1", answers, references)


@METRICS.register("rouge-2", batched=True)
def rouge_2(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE-2: F1 of the pairs of neighbouring words that answer and reference share."""
    return _rouge("rouge2", answers, references)


@METRICS.register("rouge-l", batched=True)
def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE-L: F1 of the longest sequence of words that both have in this order, gaps allowed."""
    return _rouge("rougeL", answers, references)


class Bleu(Section):
    """Settings of bleu."""

    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """sacrebleu's tokenizer: `13a` is its default, `zh` for Chinese, `char` for scripts without spaces, `none` for \
texts that are tokenized already."""


def pooled_bleu(sums: Any) -> Any:
    """Corpus BLEU of summed statistics (..., 10): lengths of answer and reference, matches and totals of 1- to 4-grams.
    The smoothing is sacrebleu's `exp`: each order without a match counts as half of the one before."""
    import numpy as np

    given, wanted = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2:6], sums[..., 6:]
    with np.errstate(divide="ignore", invalid="ignore"):
        halvings = 2.0 ** np.cumsum(matches == 0, axis=-1)
        precisions = 100 * np.where(matches > 0, matches, 1 / halvings) / totals
        brevity = np.exp(np.minimum(0, 1 - wanted / given))
        score = brevity * np.exp(np.log(precisions).mean(-1))
    return np.where(matches.any(-1) & (totals > 0).all(-1), score, 0.0)


@METRICS.register("bleu", settings=Bleu, unit="points", batched=True, pool=pooled_bleu)
def bleu(answers: Sequence[str], references: Sequence[str], settings: Bleu) -> list[dict[str, Any]]:
    """BLEU (sacrebleu), of all rows together, from 0 to 100."""
    from sacrebleu.metrics import BLEU

    # Any order gives the same counts; this one avoids a warning about short texts.
    scorer = BLEU(tokenize=settings.tokenize, effective_order=True, force=True)
    rows = (scorer.sentence_score(answer, [reference]) for answer, reference in zip(answers, references, strict=True))
    return [{"": (row.sys_len, row.ref_len, *row.counts, *row.totals)} for row in rows]


class Chrf(Section):
    """Settings of chrf."""

    word_order: Annotated[int, Field(ge=0, le=2)] = 0
    """The longest word n-gram that counts beside characters: 0 is chrF, 2 is chrF++."""


def _pooled_chrf(sums: Any) -> Any:
    """Corpus chrF from summed statistics (..., 3 x orders): each order's n-grams in answer, in reference, in both."""
    import numpy as np

    given, wanted, shared = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    counted = (given > 0) & (wanted > 0)
    orders = np.maximum(counted.sum(-1), 1)
    precision = np.where(counted, shared / np.maximum(given, 1), 0).sum(-1) / orders
    recall = np.where(counted, shared / np.maximum(wanted, 1), 0).sum(-1) / orders
    beta_squared = 4  # recall counts twice as much as precision (Popovic 2015)
    below = beta_squared * precision + recall
    return 100 * (1 + beta_squared) * precision * recall / np.where(below > 0, below, 1)


@METRICS.register("chrf", settings=Chrf, unit="points", batched=True, pool=_pooled_chrf)
def chrf(answers: Sequence[str], references: Sequence[str], settings: Chrf) -> list[dict[str, Any]]:
    """chrF (sacrebleu): F2 of character n-grams, of all rows together, from 0 to 100."""
    from sacrebleu.metrics import CHRF

    # The statistics of single rows are what sacrebleu's own bootstrap resamples; there is no public name for them.
    statistics = CHRF(word_order=settings.word_order)._extract_corpus_statistics(list(answers), [list(references)])
    return [{"": tuple(row)} for row in statistics]


def _pooled_ratio(sums: Any) -> Any:
    from lorakit.evaluate.metric import ratio

    return ratio(sums)


@METRICS.register("length-ratio", unit="ratio", higher=None, pool=_pooled_ratio)
def length_ratio(answer: str, reference: str) -> dict[str, Any]:
    """Characters of all answers over characters of all references: 1 is as long, 2 twice as long."""
    return {"": (len(answer.strip()), len(reference.strip()))}
