"""Metrics of the answer as a whole: how long it is, and what it means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.evaluate.metrics.settings import Semantic
from lorakit.registry import METRICS


def pooled_ratio(sums: Any) -> Any:
    """First statistic over second; NaN where the second is 0."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


@METRICS.register("length-ratio", unit="ratio", higher=None, pool=pooled_ratio)
def length_ratio(answer: str, reference: str) -> dict[str, Any]:
    """Characters of all answers over characters of all references: 1 is as long, 2 twice as long."""
    return {"": (len(answer.strip()), len(reference.strip()))}


@METRICS.register("semantic-similarity", settings=Semantic, unit="ratio", batched=True)
def semantic_similarity(
    answers: Sequence[str], references: Sequence[str], settings: Semantic
) -> list[dict[str, float]]:
    """Cosine of the embeddings of answer and reference, by a local embedding model: 1 means the same direction.

    What the number means depends on the model: compare models on it, do not read it as a share. Opposite statements
    about one subject are often similar.
    """
    from lorakit.evaluate.embedding import embeddings

    texts = list(dict.fromkeys([*answers, *references]))
    vectors = dict(zip(texts, embeddings(Path(settings.model), texts), strict=True))
    pairs = zip(answers, references, strict=True)
    return [{"": float(vectors[answer] @ vectors[reference])} for answer, reference in pairs]
