"""General text: what a model could do before it was trained, as passages whose loss can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.files import read_file
from lorakit.data.formats.columns import empty
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.evaluate.losses import row_losses, trained_tokens
from lorakit.model.fused import fused_lora
from lorakit.model.load import pad_token_id
from lorakit.progress import Progress
from lorakit.recipe.problems import shown_path

# Tokens of a text that are scored: enough for an article, little enough for a processor.
_LONGEST = 1024


@dataclass(frozen=True)
class GeneralText:
    """`register`: the kind of text, such as narrative or code; "" where a file does not say."""

    id: str
    register: str
    text: str


def general_rows(path: Path | None = None) -> list[GeneralText]:
    """The texts of a file, or the bundled ones (general/README.md).

    A file has rows with `text`, and may have `id` and `register`; a `.txt` or `.md` is one text. An id is else the
    row's place.

    Raises:
        UserError: the file cannot be read, or a row has no text. It names the line.
    """
    if path is None:
        with as_file(files("lorakit.evaluate") / "general" / "texts.jsonl") as bundled:
            return general_rows(bundled)
    found = []
    for row in read_file(path):
        if isinstance(row.record, RowError):
            raise UserError(f"{row.where}: {row.record}.")
        text = row.record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{row.where}: the row has no 'text', which a file of general texts needs in each row.")
        given = row.record.get("id")
        name, register = row.where if empty(given) else str(given), row.record.get("register")
        found.append(GeneralText(name, register if isinstance(register, str) else "", text))
    if not found:
        raise UserError(f"{shown_path(path)}: the file has no texts. Write rows with 'text'.")
    return found


def text_losses(
    model: Any, tokenizer: Any, texts: Sequence[str], progress: Progress, note: str = "general texts"
) -> tuple[np.ndarray, np.ndarray]:
    """The summed cross-entropy of each text (texts,) in nats, and its predicted tokens (texts,).

    Texts are given as they are, without a chat template, with the special tokens that the tokenizer sets in front of a
    document; no more than 1,024 tokens of each. A text of a single token predicts nothing: 0 of both.

    Raises:
        LorakitError: the model gives no numbers.
    """
    most = min(_LONGEST, getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST)
    encoded = [tokenizer(text)["input_ids"][:most] for text in texts]
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) > 1]
    there = np.array([len(ids) > 1 for ids in encoded], bool)
    nats, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    with fused_lora(model):
        nats[there] = row_losses(model, rows, pad_token_id(tokenizer), note, progress)
    tokens[there] = trained_tokens(rows)
    return nats, tokens
