"""What a chat template writes around messages, learned from what it makes of marked conversations: no Jinja is
translated. What is learned is only a guess until it is compared with the template on other conversations."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.rows import Message, RowError
from lorakit.recipe.problem import one_line

SYSTEM = "lorakitsystemmark"
"""Where the text of the first message, a system prompt, stands in `MessageSlot.before`."""

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
# What every template must take: one to four turns. What it may refuse: a conversation of which the beginning was cut
# off, system messages further on.
_TURNS = ("u", "uau", "uauau", "uauauau")
_OTHERS = {"assistant": ("au", "auau", "auauau"), "system": ("us", "usau", "uasu", "uasuau", "uausau")}
_PADS = "\n \u3000", "\u3000 \n"


Opening = Literal["none", "empty", "given"]
"""The system prompt with which a conversation begins."""


class Place(NamedTuple):
    """Where a message stands."""

    system: Opening
    previous: str  # the role of the message before it, the system prompt aside; empty where it is the first
    role: str  # its own; empty where the next answer begins
    last: bool  # whether the next answer follows it


class Trim(NamedTuple):
    """The white space that is taken away from a text."""

    left: bool
    right: bool
    characters: str | None  # None: all that Python's str.strip() takes

    def apply(self, text: str) -> str:
        text = text.lstrip(self.characters) if self.left else text
        return text.rstrip(self.characters) if self.right else text


NO_TRIM = Trim(False, False, None)
_SIDES = ((True, True), (False, True), (True, False))
_TRIMS = (NO_TRIM, *(Trim(*sides, characters) for characters in (None, "\n") for sides in _SIDES))


class MessageSlot(NamedTuple):
    """What is written before a message's text, and what of that text is."""

    before: str
    trim: Trim = NO_TRIM


@dataclass(frozen=True)
class ChatShape:
    """The slots of a chat template. `takes`: what it takes besides turns of user and assistant; `system_trim` is of a
    system prompt."""

    slots: Mapping[Place, MessageSlot]
    takes: frozenset[str]
    system_trim: Trim = NO_TRIM

    def without_beginning(self, text: str) -> "ChatShape | None":
        """The same where something else writes this text at the beginning; None where it does not begin so."""
        firsts = [slot.before for place, slot in self.slots.items() if place.previous == ""]
        if not all(before.startswith(text) for before in firsts):
            return None
        cut = {
            place: slot._replace(before=slot.before.removeprefix(text)) if place.previous == "" else slot
            for place, slot in self.slots.items()
        }
        return replace(self, slots=cut)


class UnknownShape(Exception):
    """A chat template whose text is not made of the same pieces in every conversation."""


def learn_shape(template: ChatTemplate) -> ChatShape:
    """The shape of a chat template; an UnknownShape where it has none."""
    openings: list[Opening] = ["none", "given", "empty"] if _takes_system(template) else ["none"]
    slots: dict[Place, MessageSlot] = {}
    for roles, opening in product(_TURNS, openings):
        _add(slots, _slots_of(template, roles, opening))
    takes = {"system prompt"} if len(openings) > 1 else set()
    for kind, conversations in _OTHERS.items():
        learned = dict(slots)
        with suppress(UnknownShape, RowError):
            for roles, opening in product(conversations, openings):
                _add(learned, _slots_of(template, roles, opening))
            slots = learned
            takes.add(kind)
    return ChatShape(slots, frozenset(takes), _system_trim(template) if len(openings) > 1 else NO_TRIM)


def _takes_system(template: ChatTemplate) -> bool:
    with suppress(RowError):
        return SYSTEM in template.write(_conversation("u", "given")[0], ask=True)
    return False


def _conversation(roles: str, opening: Opening) -> tuple[list[Message], list[str]]:
    """Messages of these roles whose texts are marks, and the marks without that of the system prompt."""
    names = [_ROLES[letter] for letter in roles]
    marks = [f"lorakit{name}{number}mark" for number, name in enumerate(names)]
    turns: list[Message] = [{"role": name, "content": mark} for name, mark in zip(names, marks, strict=True)]
    system: Message = {"role": "system", "content": SYSTEM if opening == "given" else ""}
    return ([] if opening == "none" else [system]) + turns, marks


def _slots_of(template: ChatTemplate, roles: str, opening: Opening) -> Iterator[tuple[Place, MessageSlot]]:
    messages, marks = _conversation(roles, opening)
    text, pattern = template.write(messages, ask=True), "|".join(marks)
    if re.findall(pattern, text) != marks:
        raise UnknownShape("it does not write every message once and in order")
    previous, first = "", len(messages) - len(marks)
    for at, before in enumerate(re.split(pattern, text)):
        if at == len(marks):
            yield Place(opening, previous, "", True), MessageSlot(before)
            break
        trim = _find_trim(template, messages, first + at, text)
        place = Place(opening, previous, messages[first + at]["role"], at == len(marks) - 1)
        yield place, MessageSlot(before, trim)
        previous = place.role


def _find_trim(template: ChatTemplate, messages: list[Message], at: int, text: str) -> Trim:
    """The white space that the template takes away from the text of one message, by what it makes of a padded one."""
    mark = messages[at]["content"]
    padded = _PADS[0] + mark + _PADS[1]
    written = template.write([*messages[:at], messages[at] | {"content": padded}, *messages[at + 1 :]], ask=True)
    for trim in _TRIMS:
        if written == text.replace(mark, trim.apply(padded)):
            return trim
    raise UnknownShape(f"it changes the text of a message of role {messages[at]['role']}")


def _system_trim(template: ChatTemplate) -> Trim:
    trims = set()
    for roles in _TURNS:
        messages, _ = _conversation(roles, "given")
        trims.add(_find_trim(template, messages, 0, template.write(messages, ask=True)))
    if len(trims) > 1:
        raise UnknownShape("it does not always take the same white space away from a system prompt")
    return trims.pop()


def _add(slots: dict[Place, MessageSlot], learned: Iterator[tuple[Place, MessageSlot]]) -> None:
    for place, slot in learned:
        if slots.setdefault(place, slot) != slot:
            what = f"a message of role {place.role}" if place.role else "the next answer"
            given = f"{one_line(repr(slots[place].before))} and {one_line(repr(slot.before))}"
            raise UnknownShape(f"it does not always write the same before {what}: {given}")
