"""Words: the tokens of a text from those of its words, most of which have been seen before.

Byte-level BPE tokenizers cut a text into words before anything else, and encode each by itself. Between two words
stands one space, and the cut is in front of it: the tokens of `a b` are those of `a` and those of ` b`. So a word has
to be encoded once, and a text is a few lookups, which halves the time of preparing rows of 2 KB. Where a tokenizer is
not of this kind, or cuts otherwise, texts are encoded whole.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any

_BETWEEN = re.compile(r"(?<=\S) (?=\S)")
_OVER_A_SPACE = re.compile("[^ĠĊĉčċČ]Ġ")
# In a pattern: a look at what is next to the words, except whether white space goes on, which is in most.
_LOOKS = re.compile(r"\(\?(?:=|!|<)|\\+[bBAGzZ]|(?<!\[)\^|\$")
_CUTTERS = ("ByteLevel", "Split", "Digits", "Punctuation")
# Characters of every kind that the patterns of tokenizers tell apart.
_KINDS = "aZ09'\"_.,-!?(){}[]<>/\\|@#$%&*+=~^`:;éßñжЖשع你のカ한١²½€…—’“·ªʰ\u0301\u200d\ufe0f😀"
_MOST_WORDS, _LONGEST_WORD = 100_000, 40
# Texts that are encoded both ways before the words are trusted.
_TRIALS = 200

Encode = Callable[[list[str]], list[list[int]]]


class WordCache:
    """The tokens of a tokenizer's words. `encode` encodes whole texts."""

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._encode = encode
        self._first: dict[str, list[int]] = {}
        self._later: dict[str, list[int]] = {}
        self._trials = 0
        self._works = _cuts_before_spaces(tokenizer, encode)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        if not self._works or not texts:
            return self._encode(list(texts))
        tokens_of_texts = self._by_words(texts)
        if self._trials < _TRIALS:
            apart = max(1, len(texts) // (_TRIALS - self._trials))
            some = list(texts[::apart])
            self._trials += len(some)
            if self._encode(some) != tokens_of_texts[::apart]:
                self._works = False
                return self._encode(list(texts))
        return tokens_of_texts

    def _by_words(self, texts: Sequence[str]) -> list[list[int]]:
        if len(self._later) + len(self._first) > _MOST_WORDS:
            self._later.clear()
            self._first.clear()
        cut = [_words(text) for text in texts]
        first = sorted({words[0] for words in cut} - self._first.keys())
        later = sorted(set(chain.from_iterable(words[1:] for words in cut)) - self._later.keys())
        encoded = self._encode([*first, *(f" {word}" for word in later)])
        self._first.update(zip(first, encoded, strict=False))
        self._later.update(zip(later, encoded[len(first) :], strict=True))
        known = self._later
        tokens_of_texts = []
        for words in cut:
            tokens = [self._first[words[0]]]
            tokens += [known[word] for word in words[1:]]
            tokens_of_texts.append(list(chain.from_iterable(tokens)))
        _forget_long(self._first, first)
        _forget_long(self._later, later)
        return tokens_of_texts


def _words(text: str) -> list[str]:
    """The text cut at each single space between two characters that are none."""
    words = text.split(" ")
    return words if words == text.split() else _BETWEEN.split(text)


def _forget_long(known: dict[str, list[int]], new: list[str]) -> None:
    for word in new:
        if len(word) > _LONGEST_WORD:
            del known[word]


def _looks_around(pattern: str) -> bool:
    for common in (r"\s+(?!\S)", r"\\s+(?!\\S)"):
        pattern = pattern.replace(common, "")
    return bool(_LOOKS.search(pattern))


def _cuts_before_spaces(tokenizer: Any, encode: Encode) -> bool:
    """Whether the tokenizer is of the kind that cuts before a space, and does so between characters of every kind."""
    if not tokenizer.is_fast:
        return False
    if any(any(map(str.isspace, token.content)) for token in tokenizer.added_tokens_decoder.values()):
        return False
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    cutter, normalizer, model = state["pre_tokenizer"] or {}, state["normalizer"], state["model"]
    cutters = cutter.get("pretokenizers", [cutter])
    if not all(one.get("type") in _CUTTERS for one in cutters) or not any(
        one["type"] == "ByteLevel" for one in cutters
    ):
        return False
    if model.get("type") != "BPE" or model.get("dropout") or (normalizer or {"type": "NFC"})["type"] != "NFC":
        return False
    patterns = [str(one.get("pattern", "")) for one in cutters]
    if any(one.get("add_prefix_space") for one in cutters) or any(map(_looks_around, patterns)):
        return False
    # A token over the space between two words; Ġ is how byte-level models write a space.
    if any(_OVER_A_SPACE.search(token) for token in model["vocab"]):
        return False
    pairs = list(product(_KINDS, _KINDS))
    whole = encode([f"x{a} {b}y" for a, b in pairs])
    before, after = (
        dict(zip(_KINDS, encode([form.format(one) for one in _KINDS]), strict=True)) for form in ("x{}", " {}y")
    )
    return all(tokens == before[a] + after[b] for (a, b), tokens in zip(pairs, whole, strict=True))
