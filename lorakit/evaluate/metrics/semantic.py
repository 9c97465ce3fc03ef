"""The meaning of the answer: embeddings by a local encoder, as sentence-transformers computes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lorakit.errors import UserError
from lorakit.recipe.fields import PathRole
from lorakit.recipe.problem import one_line
from lorakit.registry import METRICS, Section

if TYPE_CHECKING:
    import numpy as np

_ROWS = 32
_WHERE = "evaluate.metrics: semantic-similarity"


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
    """One unit vector per text (texts, width), by the embedding model of a folder.

    States are averaged over the text's tokens, or the first one is taken if sentence-transformers' files in the folder
    say so. A text longer than the model takes is cut at its end.
    """
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

    from lorakit.model.base_files import refuse_code
    from lorakit.model.safetensors_header import weight_files

    refuse_code(folder, f"{_WHERE}: ")
    try:
        weight_files(folder)  # refuses weights outside the folder
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (UserError, OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{_WHERE}: {folder} cannot be loaded as an embedding model: {one_line(str(error), 200)}. Write the folder "
            "of an encoder with safetensors weights and its tokenizer."
        ) from error
    if tokenizer.pad_token_id is None or not hasattr(model.config, "hidden_size"):
        raise UserError(
            f"{_WHERE}: {folder} is not an encoder: its tokenizer has no padding token. Write the folder of an "
            "embedding model."
        )
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
