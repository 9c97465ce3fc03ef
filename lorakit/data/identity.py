"""What a row says as one number, by which rows are chosen and split wherever they stand."""

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from lorakit.data.conversations import Conversation, Said


def used(said: Said) -> Said:
    """Without the messages behind the last answer, of which nothing is trained and nothing asked."""
    if not isinstance(said, Conversation) or not said.messages or said.messages[-1]["role"] == "assistant":
        return said
    last = max((at for at, message in enumerate(said.messages) if message["role"] == "assistant"), default=None)
    return said if last is None else replace(said, messages=said.messages[: last + 1])


def digest_of(said: Said) -> bytes:
    """The sha256 of what a row says, its system prompt aside: the same in every process and version, whatever file and
    format it came from."""
    if isinstance(said, Conversation):
        messages = [message for message in said.messages if message["role"] != "system"]
        content: Any = [messages, said.tools] if said.tools else messages
    else:
        content = asdict(said)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def point(digest: bytes) -> float:
    """Where what a row says lies between 0 and 1."""
    return int.from_bytes(digest[:8], "big") / 2**64
