"""The few numbers of each row by which the checks of a whole set compare rows without holding their texts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.cleaning.minhash import signatures
from lorakit.data.cleaning.style import language, measures
from lorakit.data.cleaning.text_checks import normalize_words
from lorakit.data.conversations import IGNORED, Conversation, Message, RowContent, Text, Tokens

_MOST_TOKENS = 6250
"""Token ids by which rows that have nothing else are compared."""


@dataclass(frozen=True)
class RowStats:
    """The stats of n rows, one entry a row in each array; picklable.

    - `content` uint64 [n, 2]: an exact hash (BLAKE2b, 128 bits) of the whole row, roles, tools and order included
    - `prompt`, `answer` uint64 [n]: hashes of what comes before the last answer, and of that answer, white space and
      case aside. 0 is none: a document has no prompt.
    - `style` float32 [n, len(FEATURES)]: measures of the last answer or of the document; NaN where there is none
    - `language` int16 [n]: a position in `style.languages()`, -1 where too little text shows one
    - `script` int8 [n]: a position in `style.SCRIPTS`, -1 where there are no letters
    - `signature` uint16 [n, SIZE], or None: see `minhash.signatures`
    `style`, `language` and `script` are None where not wanted. 63 bytes a row, 128 more with a signature.
    """

    content: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray
    style: np.ndarray | None
    language: np.ndarray | None
    script: np.ndarray | None
    signature: np.ndarray | None


def join_row_stats(parts: list[dict[str, Any]]) -> RowStats | None:
    """The stats of many batches as one; None where there are none. `parts`: the arrays of each, all with the same ones.

    The parts are emptied, one array after the other: all at once they would be in memory twice.
    """
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
    """The stats of these rows: signatures only where `near`, measures of style only where `style`.

    Equal rows have equal stats in every process and every version of Python.
    """
    hashes = [_hashes(row) for row in rows]
    content, prompt, answer = (
        np.frombuffer(b"".join(digests[part] for digests in hashes), "<u8").astype(np.uint64) for part in range(3)
    )
    answers = [_last_answer(row) for row in rows] if style else []
    counts, scripts = measures(answers) if style else (None, None)
    return RowStats(
        content=content.reshape(-1, 2),
        prompt=prompt,
        answer=answer,
        style=counts,
        language=np.array([language(text) for text in answers], np.int16) if style else None,
        script=scripts,
        signature=signatures([_compared_text(row) for row in rows]) if near else None,
    )


def _hashes(row: RowContent) -> tuple[bytes, bytes, bytes]:
    """The hashes of the whole (16 bytes), of the prompt and of the last answer (8 bytes each, zeros for none)."""
    none = bytes(8)
    if isinstance(row, Tokens):
        ids, labels = np.array(row.input_ids, np.int64), np.array(row.labels, np.int64)
        trained = labels[labels != IGNORED]
        start = int(np.argmax(labels != IGNORED)) if trained.size else len(ids)
        whole = _digest(ids.tobytes() + b"|" + labels.tobytes(), 16)
        return whole, _digest(ids[:start].tobytes()) if start else none, _digest(trained.tobytes())
    if isinstance(row, Text):
        return _digest("text:" + row.text, 16), none, _digest(normalize_words(row.text))
    whole, last = _digest(_json([row.messages, row.tools]), 16), _last_answer_number(row)
    if last is None:
        return whole, none, none
    prompt, before = none, row.messages[:last]
    if any(message["role"] != "system" for message in before):
        parts = [f"{message['role']}\x1f{_normalized(message)}" for message in before]
        prompt = _digest("\x1e".join([*parts, _json(row.tools) if row.tools else ""]))
    return whole, prompt, _digest(_normalized(row.messages[last]))


def _normalized(message: Message) -> str:
    """A message's content, white space and case aside, and its calls."""
    calls = message.get("tool_calls")
    return normalize_words(message.get("content") or "") + (f"\x1f{_json(calls)}" if calls else "")


def _last_answer_number(row: Conversation) -> int | None:
    return max((at for at, message in enumerate(row.messages) if message["role"] == "assistant"), default=None)


def _last_answer(row: RowContent) -> str:
    if isinstance(row, Tokens):
        return ""
    if isinstance(row, Text):
        return row.text
    last = _last_answer_number(row)
    return "" if last is None else row.messages[last].get("content") or ""


def _compared_text(row: RowContent) -> str:
    """What near-duplicates are compared by: no system prompts, since rows that share a long one would all be alike."""
    if isinstance(row, Tokens):  # as the words of a text
        return " ".join(map(str, row.input_ids[:_MOST_TOKENS]))
    if isinstance(row, Text):
        return row.text
    parts = []
    for message in row.messages:
        if message["role"] != "system":
            parts.append(message.get("content") or "")
            if message.get("tool_calls"):
                parts.append(_json(message["tool_calls"]))
    return "\n".join(parts)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _digest(content: bytes | str, size: int = 8) -> bytes:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=size).digest()
