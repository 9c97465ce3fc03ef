"""What a row says as one number, by which rows are chosen and split wherever they stand."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from lorakit.data.conversations import Conversation, Said


def digest_of(said: Said) -> bytes:
    """The sha256 of what a row says: the same in every process and version, whatever file and format it came from."""
    if isinstance(said, Conversation):
        content: Any = [said.messages, said.tools] if said.tools else said.messages
    else:
        content = asdict(said)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def point(digest: bytes) -> float:
    """Where what a row says lies between 0 and 1."""
    return int.from_bytes(digest[:8], "big") / 2**64
