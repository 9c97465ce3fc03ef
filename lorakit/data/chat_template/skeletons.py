"""Skeletons: the text of all conversations of one shape, for templates that write contents down as they are.

The first conversation of a shape is rendered in full, with all that is checked of it, on marks in the place of what the
messages say. Where the template looked into none of them, the text between the marks is that of every conversation
with the same roles, and so are the trained turns.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lorakit.data.chat_template.spans import Span
from lorakit.data.chat_template.template import ChatTemplate
from lorakit.data.chat_template.template_probe import TemplateMessage
from lorakit.data.chat_template.watched import content
from lorakit.data.conversations import Message
from lorakit.data.rows import RowError

# White space that no template writes, and in the middle all that an escaping or a change of case would touch.
_BEFORE, _BEHIND = "\x0b\x1c", "\x1d\x0c"
_CORE = "\ue000<\"Aa&'\\\n\t{number}\ue001"
_FOUND = re.compile("([\x0b\x1c]*)\ue000<\"Aa&'\\\\\n\t(\\d+)\ue001([\x1d\x0c]*)")
_LONGEST = 64


@dataclass(frozen=True)
class Skeleton:
    """One text: `pieces` stand around the contents `slots`; `stripped`, whether those lose the white space around them.

    `spans`: start and end of each trained turn, as (piece, character in it), and its stop; `skipped` likewise.
    """

    pieces: tuple[str, ...]
    slots: tuple[int, ...]
    stripped: tuple[bool, ...]
    spans: tuple[tuple[tuple[int, int], tuple[int, int], str], ...]
    skipped: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    everything: bool
    note: str

    def filled(self, contents: Sequence[str]) -> tuple[str, tuple[Span, ...], bool, tuple[tuple[int, int], ...]]:
        """The text of a conversation that says `contents`, its trained turns, whether all else is trained too, and
        what of it is skipped.

        Raises:
            UnicodeEncodeError: a content has half of a surrogate pair.
        """
        parts = [self.pieces[0]]
        starts, at = [0], len(self.pieces[0])
        for slot, strip, piece in zip(self.slots, self.stripped, self.pieces[1:], strict=True):
            said = contents[slot].strip() if strip else contents[slot]
            parts += (said, piece)
            at += len(said)
            starts.append(at)
            at += len(piece)
        spans = tuple(Span(starts[a] + b, starts[c] + d, stop) for (a, b), (c, d), stop in self.spans)
        skipped = tuple((starts[a] + b, starts[c] + d) for (a, b), (c, d) in self.skipped)
        text = "".join(parts)
        text.isascii() or text.encode()
        return text, spans, self.everything, skipped


class _Watching(ChatTemplate):
    """A template that is handed contents which note each look into them."""

    seeks_remedies = False

    def write(
        self,
        told: list[TemplateMessage],
        ask: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        watched = [{**message, "content": content(message["content"], self.looks)} for message in told]
        return super().write(watched, ask, tools, variables)

    @property
    def looks(self) -> list[str]:
        return self.__dict__.setdefault("looked", [])


def shape_of(messages: Sequence[Message]) -> tuple[Any, ...] | None:
    """What two conversations must share to have one skeleton; None for one that has more than roles and contents."""
    if len(messages) > _LONGEST:
        return None
    shape = []
    for message in messages:
        if len(message) > 2 and not (len(message) == 3 and "train" in message):
            return None
        if not message["content"].strip():
            return None
        shape.append((message["role"], message.get("train", True)))
    return tuple(shape)


def skeletons(
    messages: Sequence[Message], template: ChatTemplate, render: Callable[[list[Message], ChatTemplate], list[Any]]
) -> tuple[Skeleton, ...] | None:
    """The texts of every conversation of this shape; None where only the template itself can tell. `render` renders
    one conversation in full."""
    if not template.notes_every_look:
        return None
    watching = _Watching(**{named.name: getattr(template, named.name) for named in fields(ChatTemplate)})
    _ = (
        template.stop,
        template.frame,
        template.thoughts,
        template.without_thoughts,
    )  # what is known of the template is taken over, not asked anew
    watching.__dict__.update(template.__dict__)
    watching.looks.clear()
    marked = [
        {**message, "content": f"{_BEFORE}{_CORE.format(number=number)}{_BEHIND}"}
        for number, message in enumerate(messages)
    ]
    try:
        texts = render(marked, watching)
    except RowError:
        return None
    if watching.looks:
        return None
    found = [_skeleton(text) for text in texts]
    whole = tuple(one for one in found if one is not None)
    ways = {(slot, strip) for one in whole for slot, strip in zip(one.slots, one.stripped, strict=True)}
    if len(whole) < len(found) or len(ways) != len({slot for slot, _ in ways}):
        return None  # a content that stands here with and there without its white space
    return whole


def _skeleton(rendered: Any) -> Skeleton | None:
    pieces, slots, stripped, bounds, at = [], [], [], [0], 0
    for mark in _FOUND.finditer(rendered.text):
        around = (mark[1], mark[3])
        if around not in ((_BEFORE, _BEHIND), ("", "")):
            return None
        pieces.append(rendered.text[at : mark.start()])
        slots.append(int(mark[2]))
        stripped.append(around == ("", ""))
        at = mark.end()
        bounds.append(at)
    pieces.append(rendered.text[at:])
    if any(strange in piece for piece in pieces for strange in "\ue000\ue001\x0b\x1c\x1d\x0c"):
        return None
    edges = [edge for span in rendered.spans for edge in (span.start, span.end)]
    edges += [edge for stretch in rendered.skipped for edge in stretch]
    placed = {edge: _placed(edge, pieces, bounds) for edge in edges}
    if None in placed.values() or rendered.opening:
        return None
    spans = tuple((placed[span.start], placed[span.end], span.stop) for span in rendered.spans)
    skipped = tuple((placed[start], placed[end]) for start, end in rendered.skipped)
    return Skeleton(tuple(pieces), tuple(slots), tuple(stripped), spans, skipped, rendered.everything, rendered.note)  # type: ignore[arg-type]


def _placed(edge: int, pieces: list[str], bounds: list[int]) -> tuple[int, int] | None:
    """The piece in which a character stands, and its place there; None inside a content. Where a piece ends and a
    content begins, the place is the piece's end."""
    for number, (start, piece) in enumerate(zip(bounds, pieces, strict=True)):
        if start <= edge <= start + len(piece):
            return number, edge - start
    return None
