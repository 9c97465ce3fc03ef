"""`oasst`: OpenAssistant's trees of messages, of which the best conversation is taken."""

import math
from collections.abc import Mapping
from typing import Any

from lorakit.data.formats.columns import add_system_and_tools, expect
from lorakit.data.rows import Conversation, Message, RowError
from lorakit.recipe.problem import one_line
from lorakit.registry import FORMATS

_ROLES = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant"}


@FORMATS.register("oasst", columns=("prompt",), optional=("system",))
def oasst(record: Mapping[str, Any]) -> Conversation:
    """`prompt`: a tree of messages with `replies` (OpenAssistant). The best reply is taken at each of its levels."""
    node = expect(record.get("prompt"), Mapping, "the column 'prompt' is not a tree of messages", "it is")
    if not _is_good(node):
        raise RowError("the prompt of the tree is deleted, or failed its review")
    path: list[Message] = []
    while node is not None:
        word, text, level = node.get("role"), node.get("text"), len(path) + 1
        role = _ROLES.get(word) if isinstance(word, str) else None
        if role is None:
            reason = f"a message of the tree has none of the roles {', '.join(_ROLES)}"
            raise RowError(reason, f"level {level}: {one_line(repr(word))}")
        expect(text, str, "a message of the tree has no text in 'text'", f"level {level} has")
        path.append({"role": role, "content": text})
        node = _best(node.get("replies"), level + 1)
    while path and path[-1]["role"] != "assistant":
        path.pop()
    if not path:
        raise RowError("the tree has no answer")
    return add_system_and_tools(record, path)


def _best(replies: Any, level: int) -> Mapping[str, Any] | None:
    if replies is None:
        return None
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise RowError("the replies in a tree are not a list of messages", f"level {level}")
    return min(filter(_is_good, replies), key=_order, default=None)


def _is_good(node: Mapping[str, Any]) -> bool:
    return node.get("deleted") is not True and node.get("review_result") is not False


def _order(node: Mapping[str, Any]) -> tuple[float, float]:
    """First low ranks, then high scores; a reply without either comes after those with it. Without a score, the
    reviewers' average quality counts: {"quality": {"value": 0.7, "count": 3}}."""
    rank, score, labels = _number(node.get("rank")), _number(node.get("score")), node.get("labels")
    quality = labels.get("quality") if isinstance(labels, Mapping) else None
    if score is None and isinstance(quality, Mapping):
        score = _number(quality.get("value"))
    return math.inf if rank is None else rank, math.inf if score is None else -score


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and (isinstance(value, int) or math.isfinite(value)) else None
