"""General text: passages that do not come from the recipe's rows, bundled or from a file."""

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from lorakit.data.formats.columns import is_empty
from lorakit.data.readers import read_file
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.recipe.problem import show_path

_MOST_TOKENS = 1024  # of a text are used: enough for an article, few enough for a processor


@dataclass(frozen=True)
class GeneralText:
    """`register`: the kind of text, such as narrative or code; "" where a file does not say."""

    id: str
    register: str
    text: str


def read_general_texts(path: Path | None = None) -> list[GeneralText]:
    """The texts of a file, or the bundled ones (general/README.md). Rows have `text`, and may have `id` (else the row's
    place) and `register`; a `.txt` or `.md` is one text. A `UserError` names a row without text."""
    if path is None:
        with as_file(files("lorakit.data") / "general" / "texts.jsonl") as bundled:
            return read_general_texts(bundled)
    texts = []
    for row in read_file(path):
        if isinstance(row.record, RowError):
            raise UserError(f"{row.where}: {row.record}.")
        text = row.record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{row.where}: the row has no 'text', which a file of general texts needs in each row.")
        given = row.record.get("id")
        name, register = row.where if is_empty(given) else str(given), row.record.get("register")
        texts.append(GeneralText(name, register if isinstance(register, str) else "", text))
    if not texts:
        raise UserError(f"{show_path(path)}: the file has no texts. Write rows with 'text'.")
    return texts


def encode_text(tokenizer: Any, text: str, model_config: Any) -> list[int]:
    """The tokens of a text, without a chat template: at most 1024, and no more than the model has positions."""
    most = min(_MOST_TOKENS, getattr(model_config.get_text_config(), "max_position_embeddings", None) or _MOST_TOKENS)
    return list(tokenizer(text)["input_ids"][:most])
