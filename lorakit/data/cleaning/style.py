"""Measures of how an answer is written: its length, its characters, its language."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

FEATURES = ("characters", "words", "line breaks", "upper case", "punctuation", "digits", "informal marks")
"""The first three are counts; upper case is a share of the letters, punctuation and digits are shares of all but white
space, informal marks (contractions, slang, emoji, exclamation marks) are per word."""

# Blocks of Unicode (Blocks.txt), wide enough to name the script of a text, no more.
_RANGES = {
    "Latin": ((0x41, 0x24F), (0x1E00, 0x1EFF)),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F),),
    "Armenian": ((0x530, 0x58F),),
    "Hebrew": ((0x590, 0x5FF),),
    "Arabic": ((0x600, 0x8FF),),
    "Indic": ((0x900, 0xDFF),),
    "Thai and Lao": ((0xE00, 0xEFF),),
    "Burmese and Khmer": ((0x1000, 0x109F), (0x1780, 0x17FF)),
    "Georgian": ((0x10A0, 0x10FF),),
    "Ethiopic": ((0x1200, 0x139F),),
    "Korean": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "Chinese and Japanese": ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF)),
}
SCRIPTS = (*_RANGES, "other")
_LOWER, _UPPER, _DIGIT, _PUNCTUATION, _BREAK, _SPACE, _EMOJI, _REST = range(8)
_MOST_CHARACTERS = 5_000
"""Characters of an answer that are counted: shares do not change beyond."""

_SLANG_WORDS = (
    "lol lmao rofl omg wtf btw idk imo imho tbh gonna wanna gotta kinda sorta dunno ain't y'all u ur pls plz thx dude "
    "bro yeah yep nope nah haha hahaha hehe hey cuz cause ya ok okay cool awesome yo wow"
)
_SLANG = frozenset(_SLANG_WORDS.split())
_CONTRACTIONS = ("n't", "'re", "'ve", "'ll", "'m ", "'d ")

_SMALL_WORDS = (
    "the and that with this from have which their these would should you your they because about are not for will it's "
    "been were what when can"
)
_ENGLISH = frozenset(_SMALL_WORDS.split())
_ENOUGH_ENGLISH = 4
_SAMPLE = 160
_FEWEST_LETTERS = 40
_FEWEST_WORDS = 10
_SURE = 0.9
_NOT_LETTERS = re.compile(r"[^\w\s'’.,-]|[\d_]")


@functools.cache
def _classes() -> np.ndarray:
    """For each code point below 0x20000 its kind and script in one byte: script * 8 + kind."""
    kinds = {"Lu": _UPPER, "Lt": _UPPER, "L": _LOWER, "M": _LOWER, "P": _PUNCTUATION, "Nd": _DIGIT, "Zs": _SPACE}
    table = np.full(0x20001, _REST, np.uint8)
    for code in range(0x10000):
        category = unicodedata.category(chr(code))
        table[code] = kinds.get(category, kinds.get(category[0], _REST))
        if category[0] in "LM":
            table[code] += 8 * SCRIPTS.index("other")
    for name, blocks in _RANGES.items():
        for first, last in blocks:
            block = table[first : last + 1]
            letters = block >= 8
            block[letters] = block[letters] % 8 + 8 * SCRIPTS.index(name)
    table[[0x0A, 0x0D, 0x09]] = _BREAK, _SPACE, _SPACE
    table[0x2600:0x27C0] = _EMOJI
    table[0x1F300:0x1FB00] = _EMOJI
    table[0x20000] = _LOWER + 8 * (len(SCRIPTS) - 2)  # the planes of rare Chinese characters
    return table


def measures(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The FEATURES of each text (float32 [n, 7], NaN for an empty one) and its main script (int8 [n], -1 for none)."""
    cut = [text[:_MOST_CHARACTERS] for text in texts]
    codes = np.frombuffer("".join(cut).encode("utf-32-le", "surrogatepass"), "<u4")
    lengths = np.array([len(text) for text in cut], np.int64)
    cells = _classes()[np.minimum(codes, 0x20000)] + np.repeat(np.arange(len(texts)) * 128, lengths)
    table = np.bincount(cells, minlength=128 * len(texts)).reshape(-1, 16, 8)
    kinds = table.sum(1).astype(np.float32)
    scripts = table[:, : len(SCRIPTS), [_LOWER, _UPPER]].sum(2)
    words = [text.lower().split() for text in cut]
    informal = [_informal_marks(text, row) for text, row in zip(cut, words, strict=True)] + kinds[:, _EMOJI]
    counts = np.array([len(row) for row in words], np.float32)
    whole = np.array([len(text) for text in texts], np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = whole / lengths
        visible = lengths - kinds[:, _SPACE] - kinds[:, _BREAK]
        letters = scripts.sum(1)
        columns = [
            np.where(whole > 0, whole, np.nan),
            np.where(whole > 0, counts * scale, np.nan),
            np.where(whole > 0, kinds[:, _BREAK] * scale, np.nan),
            np.where(letters >= _FEWEST_LETTERS, kinds[:, _UPPER] / letters, np.nan),
            np.where(visible >= _FEWEST_LETTERS, kinds[:, _PUNCTUATION] / visible, np.nan),
            np.where(visible >= _FEWEST_LETTERS, kinds[:, _DIGIT] / visible, np.nan),
            np.where(counts >= _FEWEST_WORDS, informal / counts, np.nan),
        ]
    main = np.where(letters >= 2, scripts.argmax(1), -1).astype(np.int8)
    return np.stack(columns, axis=1).astype(np.float32), main


def _informal_marks(text: str, words: list[str]) -> int:
    plain = text.replace("’", "'") if "’" in text else text
    contractions = sum(map(plain.count, _CONTRACTIONS)) if "'" in plain else 0
    exclamations = text.count("!") - text.count("![") - text.count("!=")  # not images of Markdown, nor comparisons
    return contractions + exclamations + sum(map(_SLANG.__contains__, words))


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.cache
def languages() -> tuple[str, ...]:
    """The codes of the languages that `language` counts, in its order (ISO 639-1)."""
    return tuple(sorted(_identifier().labels))


def language(text: str) -> int:
    """The language of a text as a position in `languages()`, or -1 where it is too short or py3langid is not sure.

    Looks at the first 160 letters or so, 80 where a letter takes several bytes. Plain English is known by its small
    words, without the model: that is most data, and the model takes 60 us a row.
    """
    sample = text[: 2 * _SAMPLE]
    if sample.isascii() and len(_ENGLISH & set(sample.lower().split())) >= _ENOUGH_ENGLISH:
        return languages().index("en")
    letters = " ".join(_NOT_LETTERS.sub(" ", sample).split())[:_SAMPLE]
    if len(letters) < (_FEWEST_LETTERS if letters.isascii() else _FEWEST_LETTERS / 3):
        return -1
    if len(letters) < 0.7 * min(len(sample), _SAMPLE):  # code, tables, JSON
        return -1
    code, sure = _identifier().classify(letters if letters.isascii() else letters[: _SAMPLE // 2])
    return languages().index(code) if sure >= _SURE else -1
