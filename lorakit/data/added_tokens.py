"""The tokens of `model.add_tokens`: whether a vocabulary lacks them, and how its tokenizer gets them."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from lorakit.data.chat_template import ChatTemplate, written_around
from lorakit.data.template_tokens import is_single_token
from lorakit.errors import UserError

_WORDS = re.compile(r"[\w\s'-]+")


def check_added_tokens(texts: Sequence[str], base: str, has_token: Callable[[str], bool]) -> None:
    """A UserError where the vocabulary of `base` has one of the texts as a token (`has_token`)."""
    if known := [text for text in texts if has_token(text)]:
        named = ", ".join(map(repr, known))
        reason = f"the vocabulary of {base} has {named} as {'one token' if len(known) == 1 else 'one token each'}"
        raise UserError(f"model.add_tokens: {reason} already. Take {'it' if len(known) == 1 else 'them'} out.")


def add_tokens(tokenizer: Any, texts: Sequence[str], base: str) -> dict[int, str]:
    """Give a tokenizer of transformers tokens that its vocabulary lacks, and return them by their ids. The marks that
    its chat template writes are special: decoding leaves them out of an answer. UserError where it has one already,
    does not read one of them as a token of its own, or does not write it as that text."""
    from tokenizers import AddedToken

    check_added_tokens(texts, base, lambda text: is_single_token(tokenizer, text))
    vocabulary = tokenizer.get_vocab()
    if entry := next((text for text in texts if text in vocabulary), None):
        reason = f"the vocabulary of {base} has an entry {entry!r} (token id {vocabulary[entry]})"
        raise UserError(f"model.add_tokens: {reason}, which its tokenizer does not make of that text. Write another.")
    written = _template_texts(tokenizer)
    for special in (True, False):
        some = [text for text in texts if (text in written and not _WORDS.fullmatch(text)) is special]
        tokens = [AddedToken(text, special=special, normalized=False) for text in some]
        tokenizer.add_tokens(tokens, special_tokens=special)
    if unread := [text for text in texts if not is_single_token(tokenizer, text)]:
        made = tokenizer.convert_ids_to_tokens(tokenizer(unread[0], add_special_tokens=False)["input_ids"])
        reason = f"the tokenizer of {base} reads {unread[0]!r} as {' '.join(map(repr, made))}, not as one token"
        raise UserError(f"model.add_tokens: {reason}. Write another text.")
    if unwritten := next((text for text in texts if not _is_written_back(tokenizer, text)), None):
        tokenizer.add_tokens([AddedToken(f" {unwritten}", normalized=False)])
        spaced = f"{unwritten!r} with a space before it, or " if _is_written_back(tokenizer, f" {unwritten}") else ""
        written = f"an answer 'a{unwritten}b' as {_write_back(tokenizer, unwritten)!r}"
        reason = f"the tokenizer of {base} reads {unwritten!r} as one token, and writes {written}"
        raise UserError(f"model.add_tokens: {reason}. Write {spaced}another text.")
    return {tokenizer.convert_tokens_to_ids(text): text for text in texts}


def _is_written_back(tokenizer: Any, text: str) -> bool:
    """Whether decoding brings a token back as its text. Byte-level tokenizers take letters such as the u with dots for
    bytes where a token has no others (tokenizers, pre_tokenizers/byte_level.rs)."""
    return text in _write_back(tokenizer, text)


def _write_back(tokenizer: Any, text: str) -> str:
    """What the tokenizer makes of a text between two letters, decoded."""
    return str(tokenizer.decode(tokenizer(f"a{text}b", add_special_tokens=False)["input_ids"]))


def _template_texts(tokenizer: Any) -> str:
    """What a tokenizer's chat template may write of its own: the texts in its source, and what it makes of others, such
    as `<|user|>` of a role. Its code is none of it."""
    own, texts = tokenizer.chat_template or "", list[str]()
    for source in own.values() if isinstance(own, dict) else [own]:
        with suppress(TemplateSyntaxError):  # an error of the rows, where they need the template
            texts += [text for _, kind, text in Environment().lex(source) if kind in ("data", "string")]
    with suppress(UserError):
        texts += [written_around(ChatTemplate(tokenizer).write)]
    return "\n".join(texts)
