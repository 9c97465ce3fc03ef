"""The tokenizer of a GGUF file: as transformers reads it, compared with another one, and as llama.cpp runs it."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import UserError, first_line
from lorakit.model.gguf_file import GgufFile
from lorakit.model.llama_cpp import GgufModel
from lorakit.recipe.problem import quote

# convert_hf_to_gguf.py names the rows of the embedding that no token has.
_UNUSED = re.compile(r"\[PAD\d+\]")


def load_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer and the chat template of a GGUF file, as transformers makes them of its metadata."""
    from transformers import AutoTokenizer

    try:
        # transformers also reads what lies beside the file, such as another tokenizer_config.json.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / path.name).symlink_to(path.resolve())
            return AutoTokenizer.from_pretrained(alone, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions
        raise UserError(
            f"{path}: transformers cannot make a tokenizer of this file: {first_line(error)}. Give the run that it was "
            "exported from as well, whose tokenizer is then used."
        ) from error


def has_vocabulary_of(header: GgufFile, tokenizer: Any) -> bool:
    """Whether a file has the tokens of a tokenizer under the same ids, and no others."""
    tokens = header.tokens
    ours = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if len(tokens) < len(ours) or not all(map(_UNUSED.fullmatch, tokens[len(ours) :])):
        return False
    differing = [(one, other) for one, other in zip(ours, tokens, strict=False) if one != other]
    return all(_is_written_as(one, other, tokenizer) for one, other in differing)


def _is_written_as(ours: str | None, its: str, tokenizer: Any) -> bool:
    """Whether convert_hf_to_gguf.py may have written one of our tokens so: it writes those that were added as they come
    out of the tokenizer again, and those of SentencePiece with spaces."""
    if ours is None:
        return bool(_UNUSED.fullmatch(its))
    if ours not in tokenizer.get_added_vocab():
        return False
    again = tokenizer.decode(tokenizer.encode(ours, add_special_tokens=False))
    return its in (again, ours.replace("\\u2581", " "))


def describe_differences(tokenizer: Any, model: GgufModel, texts: Sequence[str]) -> list[str]:
    """Of each text that llama.cpp cuts into other tokens than a tokenizer: where the first one differs."""
    differences = []
    for text in texts:
        ours, its = tokenizer(text, add_special_tokens=False)["input_ids"], model.tokenize(text)
        if ours != its:
            differences.append(_first_difference(tokenizer, model, ours, its))
    return differences


def _first_difference(tokenizer: Any, model: GgufModel, ours: list[int], its: list[int]) -> str:
    at = next((at for at, (one, other) in enumerate(zip(ours, its, strict=False)) if one != other), len(its) - 1)
    trained = " ".join(quote(str(word)) for word in tokenizer.convert_ids_to_tokens(ours[at : at + 4]))
    read = " ".join(quote(model.piece(token)) for token in its[at : at + 4])
    return f"{trained} where llama.cpp reads {read}"


def missed_stops(model: GgufModel, stop_ids: Sequence[int]) -> list[int]:
    """The tokens at which llama.cpp does not end an answer."""
    return [token for token in stop_ids if not model.ends_answers(token)]
