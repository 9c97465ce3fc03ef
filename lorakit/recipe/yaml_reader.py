"""YAML read strictly: version 1.2's core rules, every position kept, every oddity a problem.

PyYAML's parser supplies the events; what they mean is decided here, since its own loader follows YAML 1.1 (`no` is a
boolean, `1e-4` is a text), forgets positions and lets a later duplicate key win.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from lorakit.recipe.problem import Location, PathParts, Problem, dotted_name, one_line, quote
from lorakit.recipe.scalars import Scalar, resolve
from lorakit.recipe.yaml_errors import explain

MAX_DEPTH = 40
MAX_VALUES = 10_000
"""Values in one text, aliases counted at their full size: ten nested aliases can stand for ten billion values."""

_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Node:
    """One value with its place: a scalar, a dict of nodes or a list of nodes."""

    value: Any
    place: Location
    key: Location | None = None
    """Where the key of this value is written; None for list items and for the whole text."""
    text: str = ""
    """A scalar as it is written, quotes removed."""
    quoted: bool = False


def children(node: Node) -> list[tuple[str | int, Node]]:
    """What a mapping or a list holds, by key or index; nothing for a scalar."""
    if isinstance(node.value, dict):
        return list(node.value.items())
    return list(enumerate(node.value)) if isinstance(node.value, list) else []


def plain(node: Node) -> Any:
    """The value without places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def find(node: Node, path: PathParts) -> Node | None:
    """The value at `path`."""
    for part in path:
        is_there = part in node.value if isinstance(node.value, dict) else _is_index(part, node.value)
        if not is_there:
            return None
        node = node.value[part]
    return node


def _is_index(part: str | int, value: Any) -> bool:
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def read_text(text: str, origin: Location) -> tuple[Node | None, list[Problem]]:
    """Read one document; None when the text cannot be read to its end."""
    bad = _UNREADABLE.search(text)
    if bad:
        place = origin.at(*position(text, bad.start()))
        name = f"U+{ord(bad[0]):04X}"
        return None, [Problem(place, "", name, f"the character {name} cannot stand in YAML", "Remove it.")]
    reading = _Reading(origin, yaml.SafeLoader(text))
    try:
        node = _document(reading)
    except _Stop as stop:
        return None, [*reading.problems, stop.problem]
    except yaml.YAMLError as error:
        explanation, mark = explain(error)
        place = reading.place(mark) if mark else origin.at(1, 1)
        return None, [*reading.problems, Problem(place, "", "", explanation.reason, explanation.remedy)]
    except (ValueError, OverflowError):
        # PyYAML hands an escape such as "\UFFFFFFFF" to chr() as it is.
        place = reading.place(reading.parser.get_mark())
        return None, [
            *reading.problems,
            Problem(place, "", "", "this escape is not a character", "Correct or remove it."),
        ]
    return node, reading.problems


def position(text: str, index: int) -> tuple[int, int]:
    """Line and column of a character, from 1."""
    line_start = max(text.rfind("\n", 0, index), text.rfind("\r", 0, index)) + 1
    line = len(re.findall("\r\n|\n|\r", text[:index])) + 1
    return line, index - line_start + 1


class _Stop(Exception):
    """Reading cannot go on."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


@dataclass
class _Reading:
    """One text being read."""

    origin: Location
    parser: yaml.SafeLoader
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, tuple[Node, int] | None] = field(default_factory=dict)
    """Finished anchors with their number of values; None while one is being read."""
    values: int = 0

    def place(self, mark: yaml.Mark) -> Location:
        return self.origin.at(mark.line + 1, mark.column + 1)

    def report(self, place: Location, path: PathParts, value: str, reason: str, remedy: str) -> None:
        self.problems.append(Problem(place, dotted_name(path), value, reason, remedy))

    def count(self, place: Location, path: PathParts, values: int) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            reason = f"there are more than {MAX_VALUES} values"
            raise _Stop(Problem(place, dotted_name(path), "", reason, "A recipe holds settings, not data."))

    def descend(self, place: Location, depth: int) -> None:
        if depth > MAX_DEPTH:
            reason = f"values are nested deeper than {MAX_DEPTH} levels"
            raise _Stop(Problem(place, "", "", reason, "No setting is that deep; remove the nesting."))


def _document(reading: _Reading) -> Node:
    parser = reading.parser
    parser.get_event()
    if parser.check_event(yaml.StreamEndEvent):
        return Node(None, reading.origin.at(1, 1))
    parser.get_event()
    node = _value(reading, ())
    parser.get_event()
    if not parser.check_event(yaml.StreamEndEvent):
        place = reading.place(parser.peek_event().start_mark)
        raise _Stop(Problem(place, "", "", "a second document begins here", "Keep one document in a file."))
    return node


def _value(reading: _Reading, path: PathParts) -> Node:
    event = reading.parser.get_event()
    place = reading.place(event.start_mark)
    if isinstance(event, yaml.AliasEvent):
        return _alias(reading, str(event.anchor), place, path)
    reading.descend(place, len(path))
    before = reading.values
    reading.count(place, path, 1)
    if event.tag is not None:
        reading.report(place, path, one_line(event.tag), "tags are not read", "Remove the word that begins with `!`.")
    if event.anchor:
        reading.anchors[event.anchor] = None
    if isinstance(event, yaml.ScalarEvent):
        node = _scalar(reading, event, place, path)
    elif isinstance(event, yaml.SequenceStartEvent):
        node = Node(_items(reading, path), place)
    else:
        node = Node(_entries(reading, path), place)
    if event.anchor:
        reading.anchors[event.anchor] = (node, reading.values - before)
    return node


def _alias(reading: _Reading, name: str, place: Location, path: PathParts) -> Node:
    if name not in reading.anchors:
        reading.report(place, path, f"*{name}", f"there is no &{name} above", "Quote a text that begins with `*`.")
        return Node(None, place)
    target = reading.anchors[name]
    if target is None:
        reading.report(place, path, f"*{name}", f"&{name} holds itself", "Write the value out.")
        return Node(None, place)
    node, values = target
    reading.count(place, path, values)
    reading.descend(place, len(path) + _height(node))
    return replace(node, place=place)


def _height(node: Node) -> int:
    return max((1 + _height(child) for _, child in children(node)), default=0)


def _scalar(reading: _Reading, event: yaml.ScalarEvent, place: Location, path: PathParts) -> Node:
    text, quoted = event.value, event.style is not None
    value: Scalar = text
    if _SURROGATE.search(text):
        reading.report(place, path, quote(text), "half a surrogate pair is not a character", "Remove the escape.")
        value = _SURROGATE.sub("\ufffd", text)
    elif not quoted and event.tag is None:
        try:
            value = resolve(text)
        except ValueError as error:
            reading.report(place, path, one_line(text), f"{one_line(text)} {error}", "Write a finite number.")
    return Node(value, place, text=text, quoted=quoted)


def _items(reading: _Reading, path: PathParts) -> list[Node]:
    items: list[Node] = []
    while not reading.parser.check_event(yaml.SequenceEndEvent):
        items.append(_value(reading, (*path, len(items))))
    reading.parser.get_event()
    return items


def _entries(reading: _Reading, path: PathParts) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    while not reading.parser.check_event(yaml.MappingEndEvent):
        key = _value(reading, (*path, "?"))
        name = _name(reading, key, path, next(reversed(entries.values()), None))
        value = _value(reading, (*path, name or "?"))
        if name is None:
            continue
        if name in entries:
            first = entries[name].key or key.place
            again = "" if first.setting else f" at line {first.line}, column {first.column}"
            reading.report(
                key.place, (*path, name), quote(plain(value)), f"already written{again}", "Remove one of the two."
            )
            continue
        entries[name] = replace(value, key=key.place)
    reading.parser.get_event()
    return entries


def _name(reading: _Reading, key: Node, path: PathParts, before: Node | None) -> str | None:
    if key.value == "<<":
        reading.report(
            key.place, (*path, "<<"), "<<", "YAML 1.2 has no merge key `<<`", "Use extends, or write the keys out."
        )
        return None
    if isinstance(key.value, str):
        return key.value
    given = key.text or quote(plain(key))
    remedy = f"Put quotes around it: {key.text!r}." if key.text else "Write a word before the colon."
    if before and type(before.value) is int and type(key.value) is int:
        whole = before.value != 0 and len(key.text) == 3
        remedy = f"A comma ends a value in braces: of a number write {before.text}{'' if whole else '.'}{key.text}."
    reading.report(key.place, (*path, given), one_line(given), f"the key {one_line(given)} is not a text", remedy)
    return None
