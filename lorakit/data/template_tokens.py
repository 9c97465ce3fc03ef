"""Whether a vocabulary has the tokens that a named chat template writes, each as one token. Without transformers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lorakit.errors import UserError
from lorakit.recipe.chat_templates import CHAT_TEMPLATES


def check_template_tokens(
    name: str, base: str, has_token: Callable[[str], bool], end_token: bool = True, added: Sequence[str] = ()
) -> None:
    """A UserError for a named template whose tokens the vocabulary of `base` lacks. `has_token`: whether a text is one
    token of it; `end_token`: whether its tokenizer names an end token; `added`: the recipe's `model.add_tokens`."""
    if not (missing := _missing(name, has_token, end_token)):
        return
    reason = f"{name} writes {', '.join(missing)}, which the vocabulary of {base} does not have as one token each"
    usable = usable_templates(has_token, end_token)
    can_be_added = {*missing} <= {*CHAT_TEMPLATES[name].tokens}
    whole = ", ".join(map(repr, [*added, *missing]))
    remedies = [f"model.add_tokens: [{whole}], which are then trained"] if can_be_added else []
    remedies += [f"{', '.join(usable)}, whose tokens it has"] if usable else []
    remedies.append("a .jinja file of texts that it has")
    raise UserError(f"model.chat_template: {reason}. Write {', or '.join(remedies)}.")


def usable_templates(has_token: Callable[[str], bool], end_token: bool) -> list[str]:
    """The named templates whose tokens a vocabulary has."""
    return [name for name in CHAT_TEMPLATES if not _missing(name, has_token, end_token)]


def _missing(name: str, has_token: Callable[[str], bool], end_token: bool) -> list[str]:
    needs = CHAT_TEMPLATES[name]
    missing = [token for token in needs.tokens if not has_token(token)]
    return [*missing, *(["an end token (eos_token)"] if needs.end_of_turn is None and not end_token else [])]


def is_single_token(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer of transformers makes one token of a text, which is this text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text


def tokens_in(folder: Path) -> Callable[[str], bool] | None:
    """Whether a text is one token, by the tokenizer.json in a model's folder; None where it has none that can be read,
    which is left to the run. What other files of the folder add to it counts."""
    inner = _read_tokenizer(folder)
    if inner is None:
        return None
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in _files_that_add(folder)]

    def has_token(text: str) -> bool:
        ids = inner.encode(text, add_special_tokens=False).ids
        is_one = len(ids) == 1 and inner.id_to_token(ids[0]) == text
        return is_one or any(json.dumps(text) in one or json.dumps(text, ensure_ascii=False) in one for one in texts)

    return has_token


def count_tokens(folder: Path) -> int | None:
    """The number after the last token's by the tokenizer.json in a model's folder; None where none can be read."""
    inner = _read_tokenizer(folder)
    return None if inner is None else 1 + max(inner.get_vocab().values(), default=-1)


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the Rust tokenizers raise bare Exceptions
        return None


def _files_that_add(folder: Path) -> list[Path]:
    return [file for name in ("tokenizer_config.json", "added_tokens.json") if (file := folder / name).is_file()]
