"""What the rows of a recipe say: texts that advice is given on, before anything is tokenized."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from lorakit.data.figures import FigureSupport, Pair, measure_figures
from lorakit.data.rows import Conversation, Row, RowContent, RowError, Text, hash_row, up_to_last_answer
from lorakit.data.sources import OpenSource

# Rows whose texts advice is given on, and rows of a source whose figures are compared: a third of a second.
_TEXTS, _COMPARED = 400, 5_000

Item = TypeVar("Item")
SourceRows = tuple[OpenSource, Sequence[Row]]
"""A source, and rows of it that are records."""


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items from the whole length; all where there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]


def _parse_evenly(source: SourceRows, most: int) -> Iterator[RowContent]:
    """What so many rows of a source say, up to their last answers."""
    opened, rows = source
    for row in evenly(rows, most):
        try:
            yield up_to_last_answer(opened.parse(row.record))  # type: ignore[arg-type]
        except RowError:
            continue


def sample_texts(sources: Sequence[SourceRows]) -> tuple[tuple[str, str], ...]:
    """Prompt and last answer of some rows; a text is an answer to nothing."""
    texts = []
    for content in (content for source in sources for content in _parse_evenly(source, _TEXTS)):
        if isinstance(content, Text):
            texts.append(("", content.text))
        elif isinstance(content, Conversation):
            *before, last = content.messages
            prompts = [message["content"] for message in before if message["role"] == "user"]
            if prompts and last["role"] == "assistant" and last.get("train", True):
                texts.append((prompts[-1], last["content"]))
    return tuple(evenly(texts, _TEXTS))


def compare_figures(train: Sequence[SourceRows], held_out: Sequence[SourceRows], share: float) -> FigureSupport | None:
    """Whether the figures of held-out answers are in their prompts or in the training answers. A `share` of the
    training rows is held out by the same numbers by which the run does it."""
    pairs: tuple[list[Pair], list[Pair]] = [], []  # of the training, and held out
    for number, source in enumerate([*train, *held_out]):
        for content in _parse_evenly(source, _COMPARED):
            if isinstance(content, Conversation) and content.messages[-1]["role"] == "assistant":
                apart = number >= len(train) or int.from_bytes(hash_row(content)[:8], "big") < share * 2**64
                *before, answer = (message["content"] for message in content.messages)
                pairs[apart].append(("\n".join(before), answer))
    return measure_figures(pairs[True], [answer for _, answer in pairs[False]])
