"""The answers of rows and models as texts: without what a chat template writes around them."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.chat_template.template_probe import compile_alternation


def decode_answer(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of an answer's tokens, without the thought before it and without what the chat template writes before
    every answer (gpt-oss: the name of the channel)."""
    text = str(tokenizer.decode(list(tokens))) if any(_around_answers(tokenizer)) else ""
    answer = after_thought(text, tokenizer)
    if answer is not None:
        return compile_alternation(frozenset(tokenizer.all_special_tokens)).sub("", answer).lstrip()
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def after_thought(text: str, tokenizer: Any) -> str | None:
    """What follows the thought, or what the chat template writes before every answer; None of a text without either."""
    end, front = _around_answers(tokenizer)
    _, mark, answer = text.rpartition(end) if end else ("", "", "")
    if not mark and front and text.lstrip().startswith(front):
        mark, answer = front, text.lstrip().removeprefix(front)
    return answer if mark else None


@lru_cache(maxsize=8)
def _around_answers(tokenizer: Any) -> tuple[str, str]:
    """The text between a thought and the answer, and that before an answer without one; empty if it is white space."""
    if not tokenizer.chat_template:
        return "", ""
    template = ChatTemplate(tokenizer)
    return (template.thoughts.after.strip() if template.thoughts else ""), template.frame[0].strip()


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stop_ids, tokens))


def reference_of(row: Mapping[str, Any], tokenizer: Any, stop_ids: Sequence[int], start: int | None = None) -> str:
    """The text of a row's answer that begins at `start`, by default its last one."""
    return decode_answer(until_stop(row["input_ids"][row["answer"] if start is None else start :], stop_ids), tokenizer)


def pairs_of(rows: Iterable[Mapping[str, Any]], tokenizer: Any, stop_ids: Sequence[int]) -> list[tuple[str, str]]:
    """Prompt and last answer of the examples that have one."""
    pairs = []
    for row in rows:
        if row["answer"] >= 0:
            prompt = str(tokenizer.decode(row["input_ids"][: row["answer"]]))
            pairs.append((prompt, reference_of(row, tokenizer, stop_ids)))
    return pairs
