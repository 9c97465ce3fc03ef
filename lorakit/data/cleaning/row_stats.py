"""The few numbers of each row by which the checks of a whole set compare rows without holding their texts: hashes,
signatures, and how an answer is written."""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.cleaning.minhash import signatures
from lorakit.data.cleaning.text_checks import normalize_words
from lorakit.data.rows import IGNORED, Message, RowContent, Text, Tokens

FEATURES = ("characters", "words", "line breaks", "upper case", "punctuation", "digits", "informal marks")
"""The first three are counts; upper case is a share of the letters, punctuation and digits are shares of all but white
space, informal marks (contractions, slang, emoji, exclamation marks) are per word."""

# Blocks of Unicode (Blocks.txt), wide enough to name the script of a text, no more.
_RANGES = {
    "Latin": ((0x41, 0x24F), (0x1E00, 0x1EFF)), "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F),), "Armenian": ((0x530, 0x58F),), "Hebrew": ((0x590, 0x5FF),),
    "Arabic": ((0x600, 0x8FF),), "Indic": ((0x900, 0xDFF),), "Thai and Lao": ((0xE00, 0xEFF),),
    "Burmese and Khmer": ((0x1000, 0x109F), (0x1780, 0x17FF)), "Georgian": ((0x10A0, 0x10FF),),
    "Ethiopic": ((0x1200, 0x139F),), "Korean": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "Chinese and Japanese": ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF)),
}  # fmt: skip
SCRIPTS = (*_RANGES, "other")
_LOWER, _UPPER, _DIGIT, _PUNCTUATION, _BREAK, _SPACE, _EMOJI, _REST = range(8)
_MOST_CHARACTERS = 5_000  # of an answer that are counted: shares do not change beyond
_MOST_TOKENS = 6250  # ids by which rows that have nothing else are compared
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
_ENGLISH, _ENOUGH_ENGLISH = frozenset(_SMALL_WORDS.split()), 4
_SAMPLE, _SURE = 160, 0.9
_FEWEST_LETTERS, _FEWEST_WORDS = 40, 10
_NOT_LETTERS = re.compile(r"[^\w\s'’.,-]|[\d_]")


@dataclass(frozen=True)
class RowStats:
    """The stats of n rows, one entry a row in each array (63 bytes, 128 more with a signature); picklable. `style`,
    `language`, `script` and `signature` are None where not wanted."""

    content: np.ndarray  # uint64 [n, 2]: an exact hash (BLAKE2b, 128 bits) of the row, roles, tools and order included
    prompt: np.ndarray  # uint64 [n]: a hash of what comes before the last answer, white space and case aside; 0 is none
    answer: np.ndarray  # uint64 [n]: the same of that answer
    style: np.ndarray | None  # float32 [n, len(FEATURES)]: of the last answer or the document; NaN where there is none
    language: np.ndarray | None  # int16 [n]: a position in `languages()`, -1 where too little text shows one
    script: np.ndarray | None  # int8 [n]: a position in `SCRIPTS`, -1 where there are no letters
    signature: np.ndarray | None  # uint16 [n, SIZE]: see `minhash.signatures`


def join_row_stats(parts: list[dict[str, Any]]) -> RowStats | None:
    """The stats of many batches as one; None where there are none. The arrays in `parts` are taken out one after the
    other: all at once would be in memory twice."""
    joined: dict[str, Any] = {}
    for name in list(parts[0]) if parts else ():
        arrays = [part.pop(name) for part in parts]
        joined[name] = None if arrays[0] is None else np.concatenate(arrays)
    return RowStats(**joined) if joined else None


def take_rows(whole: RowStats, rows: np.ndarray) -> RowStats:
    """The stats of some rows, given by their numbers in order."""
    if len(rows) == len(whole.content):
        return whole
    some = {name: None if array is None else array[rows] for name, array in vars(whole).items()}
    return RowStats(**some)  # type: ignore[arg-type]


def compute_row_stats(rows: Sequence[RowContent], near: bool, style: bool = True) -> RowStats:
    """The stats of these rows: signatures only where `near`, measures of style only where `style`. Equal rows have
    equal stats in every process and every version of Python."""
    parts = [_describe(row, near) for row in rows]
    content, prompt, answer = (
        np.frombuffer(b"".join(digests[kind] for digests, _, _ in parts), "<u8").astype(np.uint64) for kind in range(3)
    )
    answers = [text for _, text, _ in parts] if style else []
    counts, scripts = measures(answers) if style else (None, None)
    spoken = np.array([language(text) for text in answers], np.int16) if style else None
    signature = signatures([text for _, _, text in parts]) if near else None
    return RowStats(content.reshape(-1, 2), prompt, answer, counts, spoken, scripts, signature)


def _describe(row: RowContent, near: bool) -> tuple[tuple[bytes, bytes, bytes], str, str]:
    """A row's hashes of the whole (16 bytes), of the prompt and of the last answer (8 bytes each, zeros for none), the
    text of that answer, and the text by which near-duplicates are compared, where `near`."""
    none = bytes(8)
    if isinstance(row, Text):
        return (_digest("text:" + row.text, 16), none, _digest(normalize_words(row.text))), row.text, row.text
    if isinstance(row, Tokens):
        ids, labels = np.array(row.input_ids, np.int64), np.array(row.labels, np.int64)
        trained = labels[labels != IGNORED]
        start = int(np.argmax(labels != IGNORED)) if trained.size else len(ids)
        whole = _digest(ids.tobytes() + b"|" + labels.tobytes(), 16)
        prompt = _digest(ids[:start].tobytes()) if start else none
        words = " ".join(map(str, row.input_ids[:_MOST_TOKENS])) if near else ""
        return (whole, prompt, _digest(trained.tobytes())), "", words
    whole = _digest(_json([row.messages, row.tools]), 16)
    compared: list[str] = []
    for message in row.own_messages if near else ():  # rows that share a long system prompt would all be alike
        compared.append(message.get("content") or "")
        compared += [_json(message["tool_calls"])] if message.get("tool_calls") else []
    last = max((at for at, message in enumerate(row.messages) if message["role"] == "assistant"), default=None)
    if last is None:
        return (whole, none, none), "", "\n".join(compared)
    prompt, before, answer = none, row.messages[:last], row.messages[last]
    if any(message["role"] != "system" for message in before):
        parts = [f"{message['role']}\x1f{_normalized(message)}" for message in before]
        prompt = _digest("\x1e".join([*parts, _json(row.tools) if row.tools else ""]))
    return (whole, prompt, _digest(_normalized(answer))), answer.get("content") or "", "\n".join(compared)


def _normalized(message: Message) -> str:
    """A message's content, white space and case aside, and its calls."""
    calls = message.get("tool_calls")
    return normalize_words(message.get("content") or "") + (f"\x1f{_json(calls)}" if calls else "")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _digest(content: bytes | str, size: int = 8) -> bytes:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=size).digest()


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
        columns = [  # the value, and whether there is enough of the text for it
            *((value, whole > 0) for value in (whole, counts * scale, kinds[:, _BREAK] * scale)),
            (kinds[:, _UPPER] / letters, letters >= _FEWEST_LETTERS),
            *((kinds[:, kind] / visible, visible >= _FEWEST_LETTERS) for kind in (_PUNCTUATION, _DIGIT)),
            (informal / counts, counts >= _FEWEST_WORDS),
        ]
    features = np.stack([np.where(enough, value, np.nan) for value, enough in columns], axis=1)
    main = np.where(letters >= 2, scripts.argmax(1), -1).astype(np.int8)
    return features.astype(np.float32), main


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
    """The language of a text as a position in `languages()`, or -1 where it is too short or py3langid is not sure. The
    first 160 letters or so tell it, 80 where a letter takes several bytes."""
    sample = text[: 2 * _SAMPLE]
    # Plain English is most data, and known by its small words: the model takes 60 us a row.
    if sample.isascii() and len(_ENGLISH & set(sample.lower().split())) >= _ENOUGH_ENGLISH:
        return languages().index("en")
    letters = " ".join(_NOT_LETTERS.sub(" ", sample).split())[:_SAMPLE]
    fewest = _FEWEST_LETTERS if letters.isascii() else _FEWEST_LETTERS / 3
    if len(letters) < max(fewest, 0.7 * min(len(sample), _SAMPLE)):  # of code, tables and JSON few letters are left
        return -1
    code, sure = _identifier().classify(letters if letters.isascii() else letters[: _SAMPLE // 2])
    return languages().index(code) if sure >= _SURE else -1
