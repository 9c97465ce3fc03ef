"""What a model could do before it was trained: its loss on general texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.data.general_texts import encode_text
from lorakit.evaluate.likelihood import row_losses, trained_tokens
from lorakit.model.fused_lora import fused_lora
from lorakit.model.tokenizer import pad_token_id
from lorakit.progress import Progress


def compute_text_losses(
    model: Any, tokenizer: Any, texts: Sequence[str], progress: Progress, note: str = "general texts"
) -> tuple[np.ndarray, np.ndarray]:
    """The summed cross-entropy of each text (texts,) in nats, and its predicted tokens (texts,).

    Texts are given as they are, without a chat template, with the special tokens that the tokenizer sets in front of a
    document; no more than 1,024 tokens of each. A text of a single token predicts nothing: 0 of both.

    Raises:
        LorakitError: the model gives no numbers.
    """
    encoded = [encode_text(tokenizer, text, model.config) for text in texts]
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) > 1]
    there = np.array([len(ids) > 1 for ids in encoded], bool)
    nats, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    with fused_lora(model):
        nats[there] = row_losses(model, rows, pad_token_id(tokenizer), note, progress)
    tokens[there] = trained_tokens(rows)
    return nats, tokens
