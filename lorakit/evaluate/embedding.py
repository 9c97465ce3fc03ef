"""Sentence embeddings by a local encoder, as sentence-transformers computes them: pooled last states of length 1."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from lorakit.errors import UserError
from lorakit.model.base_files import refuse_code
from lorakit.model.safetensors_header import weight_files
from lorakit.recipe.problem import one_line

_ROWS = 32


def embeddings(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """One unit vector a text (texts, width).

    States are averaged over the text's tokens, or the first one is taken where sentence-transformers' own file in the
    folder says so. A text longer than the model takes is cut at its end.

    Raises:
        UserError: the folder holds no embedding model, or one that is pooled in another way.
    """
    first = _takes_first(folder)
    model, tokenizer = _loaded(folder)
    longest = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)))
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        batch = tokenizer(
            [texts[index] for index in chosen], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        pooled = states[:, 0] if first else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        found[chosen] = torch.nn.functional.normalize(pooled, dim=1).numpy()
    return found


def _loaded(folder: Path) -> tuple[Any, Any]:
    refuse_code(folder, "evaluate.metrics: semantic-similarity: ")
    try:
        weight_files(folder)  # none of them lies elsewhere
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (UserError, OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"evaluate.metrics: semantic-similarity: {folder} cannot be loaded as an embedding model: "
            f"{one_line(str(error), 200)}. Write the folder of an encoder with safetensors weights and its tokenizer."
        ) from error
    if tokenizer.pad_token_id is None or not hasattr(model.config, "hidden_size"):
        raise UserError(
            f"evaluate.metrics: semantic-similarity: {folder} is not an encoder: its tokenizer has no padding token. "
            "Write the folder of an embedding model."
        )
    return model.eval(), tokenizer


def _takes_first(folder: Path) -> bool:
    """Whether the first token's state stands for the text; sentence-transformers says so in a file of its own."""
    modules, pooling = folder / "modules.json", folder / "1_Pooling" / "config.json"
    if not modules.is_file():
        return False
    kinds = [module["type"].rpartition(".")[2] for module in json.loads(modules.read_text(encoding="utf-8"))]
    said = json.loads(pooling.read_text(encoding="utf-8")) if pooling.is_file() else {}
    modes = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on]
    if not set(kinds) <= {"Transformer", "Pooling", "Normalize"} or modes not in (["mean_tokens"], ["cls_token"]):
        raise UserError(
            f"evaluate.metrics: semantic-similarity: {folder} pools by {', '.join(modes) or 'nothing'} in "
            f"{', '.join(kinds)}, and only the mean of the tokens or the first one is taken here. Write another model."
        )
    return modes == ["cls_token"]
