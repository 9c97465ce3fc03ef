"""The few numbers a row leaves behind, by which the checks of a whole set compare rows without holding their texts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.cleaning.minhash import signatures, token_text
from lorakit.data.cleaning.style import language, measures
from lorakit.data.conversations import Conversation, Message, RowContent, Tokens


@dataclass(frozen=True)
class RowStats:
    """The traits of n rows, one entry a row in each array; picklable, and joined by `RowStatsBuilder`.

    - `said` uint64 [n, 2]: an exact hash (BLAKE2b, 128 bits) of all that the row says, roles, tools and order included
    - `prompt`, `answer` uint64 [n]: of what stands before the last answer, and of that answer, white space and case
      aside. 0 is none: a document has no prompt.
    - `style` float32 [n, len(FEATURES)]: measures of the last answer or of the document; NaN where there is none
    - `language` int16 [n]: a place in `style.languages()`, -1 where too little text shows one
    - `script` int8 [n]: a place in `style.SCRIPTS`, -1 where there are no letters
    - `signature` uint16 [n, SIZE], or None: see `near.signatures`
    `style`, `language` and `script` are None where not asked for. 63 bytes a row, 128 more with a signature.
    """

    content: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray
    style: np.ndarray | None
    language: np.ndarray | None
    script: np.ndarray | None
    signature: np.ndarray | None


class RowStatsBuilder:
    """Traits of many batches of rows on their way into one; all batches have the same arrays."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray | None]] = {}

    def add(self, part: RowStats) -> None:
        for name, array in vars(part).items():
            self._parts.setdefault(name, []).append(array)

    def joined(self) -> RowStats | None:
        """The traits of all rows so far, behind each other; None where there are none. What was added is given up, one
        array after the other: all at once they would be in memory twice."""
        joined: dict[str, Any] = {}
        for name in list(self._parts):
            parts = [array for array in self._parts.pop(name) if array is not None]
            joined[name] = np.concatenate(parts) if parts else None
        return RowStats(**joined) if joined else None


def take_rows(whole: RowStats, rows: np.ndarray) -> RowStats:
    """The traits of some rows, given by their places in order."""
    if len(rows) == len(whole.content):
        return whole
    some = {name: None if array is None else array[rows] for name, array in vars(whole).items()}
    return RowStats(**some)  # type: ignore[arg-type]


def compute_row_stats(saids: Sequence[RowContent], near: bool, style: bool = True) -> RowStats:
    """The traits of these rows: signatures only where `near`, measures of style only where `style`.

    Equal rows have equal traits in every process and every version of Python.
    """
    exact, prompts, answers, texts = [], [], [], []
    for said in saids:
        whole, prompt, answer = _hashed(said)
        exact.append(whole)
        prompts.append(prompt)
        answers.append(answer)
        texts.append(_answer(said))
    counts, scripts = measures(texts) if style else (None, None)
    return RowStats(
        content=np.frombuffer(b"".join(exact), "<u8").reshape(-1, 2).astype(np.uint64),
        prompt=np.frombuffer(b"".join(prompts), "<u8").astype(np.uint64),
        answer=np.frombuffer(b"".join(answers), "<u8").astype(np.uint64),
        style=counts,
        language=np.array([language(text) for text in texts], np.int16) if style else None,
        script=scripts,
        signature=signatures([_content(said) for said in saids]) if near else None,
    )


def _hashed(said: RowContent) -> tuple[bytes, bytes, bytes]:
    """The hashes of the whole (16 bytes), of the prompt and of the last answer (8 bytes each)."""
    if isinstance(said, Tokens):
        ids = np.array(said.input_ids, np.int64)
        labels = np.array(said.labels, np.int64)
        trained = labels[labels != -100]
        start = int(np.argmax(labels != -100)) if trained.size else len(ids)
        whole = _digest(ids.tobytes() + b"|" + labels.tobytes(), 16)
        return whole, _part(ids[:start].tobytes()) if start else bytes(8), _part(trained.tobytes())
    if not isinstance(said, Conversation):
        return _digest(b"text:" + _bytes(said.text), 16), bytes(8), _part(_bytes(_plain(said.text)))
    whole = _digest(_bytes(_json([said.messages, said.tools])), 16)
    last = _last_answer(said)
    if last is None:
        return whole, bytes(8), bytes(8)
    before = said.messages[:last]
    asked = any(message["role"] != "system" for message in before)
    told = [f"{message['role']}\x1f{_given(message)}" for message in before]
    prompt = _part(_bytes("\x1e".join([*told, _json(said.tools) if said.tools else ""]))) if asked else bytes(8)
    return whole, prompt, _part(_bytes(_given(said.messages[last])))


def _given(message: Message) -> str:
    """What a message says, white space and case aside, and what it calls."""
    calls = message.get("tool_calls")
    return _plain(message.get("content") or "") + (f"\x1f{_json(calls)}" if calls else "")


def _last_answer(said: Conversation) -> int | None:
    roles = [message["role"] for message in said.messages]
    return len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else None


def _answer(said: RowContent) -> str:
    if isinstance(said, Tokens):
        return ""
    if not isinstance(said, Conversation):
        return said.text
    last = _last_answer(said)
    return "" if last is None else said.messages[last].get("content") or ""


def _content(said: RowContent) -> str:
    """What near-duplicates are compared by: no system prompts, for rows that share a long one would all be alike."""
    if isinstance(said, Tokens):
        return token_text(said.input_ids)
    if not isinstance(said, Conversation):
        return said.text
    parts = []
    for message in said.messages:
        if message["role"] != "system":
            parts.append(message.get("content") or "")
            if message.get("tool_calls"):
                parts.append(_json(message["tool_calls"]))
    return "\n".join(parts)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


def _part(content: bytes) -> bytes:
    return _digest(content, 8)
