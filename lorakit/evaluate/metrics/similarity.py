"""Metrics of how near two texts are: what they share (ROUGE, BLEU, chrF), their lengths, and their meaning by a local
encoder, embedded as sentence-transformers does."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lorakit.errors import UserError
from lorakit.evaluate.metrics.matching import tokens
from lorakit.recipe.fields import PathRole
from lorakit.recipe.problem import one_line
from lorakit.registry import METRICS, Section

if TYPE_CHECKING:
    import numpy as np

_ROWS = 32
_WHERE = "evaluate.metrics: semantic-similarity"


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


class Semantic(Section):
    """Settings of semantic-similarity."""

    model: Annotated[str, Field(min_length=1), PathRole("models/all-MiniLM-L6-v2", or_folder=True)]
    """The folder of an embedding model: an encoder with its tokenizer, as transformers or sentence-transformers saved \
it."""


@METRICS.register("semantic-similarity", settings=Semantic, unit="ratio", batched=True)
def semantic_similarity(
    answers: Sequence[str], references: Sequence[str], settings: Semantic
) -> list[dict[str, float]]:
    """Cosine of the embeddings of answer and reference, by a local embedding model: 1 means the same direction.

    What the number means depends on the model: compare models on it, do not read it as a share. Opposite statements
    about one subject are often similar.
    """
    texts = list(dict.fromkeys([*answers, *references]))
    vectors = dict(zip(texts, embeddings(Path(settings.model), texts), strict=True))
    pairs = zip(answers, references, strict=True)
    return [{"": float(vectors[answer] @ vectors[reference])} for answer, reference in pairs]


def embeddings(folder: Path, texts: Sequence[str]) -> "np.ndarray":
    """One unit vector per text (texts, width), by the embedding model of a folder: the mean of its tokens' states, or
    the first one if sentence-transformers' files there say so. A text longer than the model takes is cut at its end."""
    import numpy as np
    import torch

    first = _takes_first(folder)
    model, tokenizer = _load(folder)
    longest = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)))
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        batch = tokenizer(
            [texts[index] for index in chosen], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        pooled = states[:, 0] if first else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        vectors[chosen] = torch.nn.functional.normalize(pooled, dim=1).numpy()
    return vectors


def _load(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from lorakit.model.base_files import refuse_code, weight_files

    refuse_code(folder, f"{_WHERE}: ")
    try:
        weight_files(folder)  # refuses weights outside the folder
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        if tokenizer.pad_token_id is None or not hasattr(model.config, "hidden_size"):
            raise ValueError("it is no encoder: its tokenizer has no padding token")
    except (UserError, OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{_WHERE}: {folder} cannot be loaded as an embedding model: {one_line(str(error), 200)}. Write the folder "
            "of an encoder with safetensors weights and its tokenizer."
        ) from error
    return model.eval(), tokenizer


def _takes_first(folder: Path) -> bool:
    """Whether the first token's state stands for the text, by sentence-transformers' files in the folder."""
    modules, pooling = folder / "modules.json", folder / "1_Pooling" / "config.json"
    if not modules.is_file():
        return False
    kinds = [module["type"].rpartition(".")[2] for module in json.loads(modules.read_bytes())]
    settings = json.loads(pooling.read_bytes()) if pooling.is_file() else {}
    modes = [key.removeprefix("pooling_mode_") for key, is_on in settings.items() if is_on and "_mode_" in key]
    if not set(kinds) <= {"Transformer", "Pooling", "Normalize"} or modes not in (["mean_tokens"], ["cls_token"]):
        raise UserError(
            f"{_WHERE}: {folder} pools by {', '.join(modes) or 'nothing'} in {', '.join(kinds)}, and only the "
            "mean of the tokens or the first token is supported. Write another model."
        )
    return modes == ["cls_token"]
