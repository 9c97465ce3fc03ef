"""YAML read strictly: version 1.2's core rules, every position remembered, every oddity a problem.

PyYAML's parser supplies the events; what they mean is decided here, since its own loader follows YAML 1.1 (`no` is a
boolean, `1e-4` is a text), forgets positions and lets a later duplicate key win.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lorakit.recipe.did_you_mean import nearest_file
from lorakit.recipe.problem import Location, PathParts, Problem, dotted_name, one_line, quote, show_path
from lorakit.recipe.yaml_errors import explain
from lorakit.recipe.yaml_scalars import resolve

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 10_000
"""Values in one text, aliases counted at their full size: ten nested aliases can stand for ten billion values."""

_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Node:
    """One value with its location: a scalar, a dict of nodes or a list of nodes."""

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
    """The value without locations."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def find(node: Node, path: PathParts) -> Node | None:
    """The value at `path`."""
    for part in path:
        inner = dict(children(node))
        if part not in inner:
            return None
        node = inner[part]
    return node


def read_file(path: Path, asking: Location, subject: str = "") -> tuple[Node | None, list[Problem]]:
    """Read a file whose top level is a mapping; None when it cannot be read.

    `asking` and `subject` are the location and the dotted name of what asks for the file: a file that cannot be opened
    is that one's mistake.
    """
    complaint = _why_no_file(path)
    if complaint is None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            complaint = f"{show_path(path)} cannot be read: {error.strerror}", "Check its permissions."
    if complaint:
        return None, [Problem(asking, subject, str(path), *complaint)]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", errors="replace")
        place = Location(path).at(*position(before, len(before)))
        return None, [Problem(place, "", "", f"byte 0x{raw[error.start]:02x} is not UTF-8", "Save the file as UTF-8.")]
    node, problems = read_text(text, Location(path))
    if node is None or isinstance(node.value, dict):
        return node, problems
    if node.value is None:
        empty = Problem(node.place, "", "", "the file has no settings", "Write at least model.base and data.train.")
        return None, [*problems, empty]
    given = "a list" if isinstance(node.value, list) else f"the single value {quote(node.value)}"
    remedy = "Write `key: value` lines, with a space after each colon."
    reason = f"the file is {given}, not a mapping"
    return None, [*problems, Problem(node.place, "", quote(node.value), reason, remedy)]


def _why_no_file(path: Path) -> tuple[str, str] | None:
    name, remedy = show_path(path), "Write the path of a YAML file."
    if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises for names that are too long or hold a NUL)
        near = nearest_file(path)
        return f"there is no file {name}", f"Did you mean {show_path(path.parent / near)}?" if near else remedy
    if path.is_dir():
        inside = path / "recipe.yaml"
        remedy = f"Did you mean {show_path(inside)}?" if inside.is_file() else remedy
        return f"{name} is a folder, not a file", remedy
    if not path.is_file():
        return f"{name} is a device, not a file", remedy
    if path.stat().st_size > MAX_BYTES:
        return f"{name} is larger than 1 MB", "A recipe holds settings, not data."
    return None


def read_text(text: str, origin: Location) -> tuple[Node | None, list[Problem]]:
    """Read one document; None when the text cannot be read to its end."""
    bad = _UNREADABLE.search(text)
    if bad:
        place, name = origin.at(*position(text, bad.start())), f"U+{ord(bad[0]):04X}"
        return None, [Problem(place, "", name, f"the character {name} cannot stand in YAML", "Remove it.")]
    parsing = _Parsing(origin, yaml.SafeLoader(text))
    try:
        return _read_document(parsing), parsing.problems
    except _Stop as stop:
        problem = stop.problem
    except yaml.YAMLError as error:
        explanation, mark = explain(error)
        place = parsing.place(mark) if mark else origin.at(1, 1)
        problem = Problem(place, "", "", explanation.reason, explanation.remedy)
    except (ValueError, OverflowError):
        # PyYAML hands an escape such as "\UFFFFFFFF" to chr() as it is.
        place = parsing.place(parsing.parser.get_mark())
        problem = Problem(place, "", "", "this escape is not a character", "Correct or remove it.")
    return None, [*parsing.problems, problem]


def position(text: str, index: int) -> tuple[int, int]:
    """Line and column of a character, from 1."""
    line_start = max(text.rfind("\n", 0, index), text.rfind("\r", 0, index)) + 1
    return len(re.findall("\r\n|\n|\r", text[:index])) + 1, index - line_start + 1


class _Stop(Exception):
    """Reading cannot go on."""

    def __init__(self, place: Location, path: PathParts, reason: str, remedy: str) -> None:
        self.problem = Problem(place, dotted_name(path), "", reason, remedy)


@dataclass
class _Parsing:
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
            raise _Stop(place, path, f"there are more than {MAX_VALUES} values", "A recipe holds settings, not data.")

    def limit_depth(self, place: Location, depth: int) -> None:
        if depth > MAX_DEPTH:
            reason = f"values are nested deeper than {MAX_DEPTH} levels"
            raise _Stop(place, (), reason, "No setting is that deep; remove the nesting.")


def _read_document(parsing: _Parsing) -> Node:
    parser = parsing.parser
    parser.get_event()
    if parser.check_event(yaml.StreamEndEvent):
        return Node(None, parsing.origin.at(1, 1))
    parser.get_event()
    node = _read_value(parsing, ())
    parser.get_event()
    if not parser.check_event(yaml.StreamEndEvent):
        place = parsing.place(parser.peek_event().start_mark)
        raise _Stop(place, (), "a second document begins here", "Keep one document in a file.")
    return node


def _read_value(parsing: _Parsing, path: PathParts) -> Node:
    event = parsing.parser.get_event()
    place = parsing.place(event.start_mark)
    if isinstance(event, yaml.AliasEvent):
        return _read_alias(parsing, str(event.anchor), place, path)
    parsing.limit_depth(place, len(path))
    before = parsing.values
    parsing.count(place, path, 1)
    if event.tag is not None:
        parsing.report(place, path, one_line(event.tag), "tags are not read", "Remove the word that begins with `!`.")
    if event.anchor:
        parsing.anchors[event.anchor] = None
    if isinstance(event, yaml.ScalarEvent):
        node = _read_scalar(parsing, event, place, path)
    elif isinstance(event, yaml.SequenceStartEvent):
        items: list[Node] = []
        while not parsing.parser.check_event(yaml.SequenceEndEvent):
            items.append(_read_value(parsing, (*path, len(items))))
        parsing.parser.get_event()
        node = Node(items, place)
    else:
        node = Node(_read_entries(parsing, path), place)
    if event.anchor:
        parsing.anchors[event.anchor] = (node, parsing.values - before)
    return node


def _read_alias(parsing: _Parsing, name: str, place: Location, path: PathParts) -> Node:
    target = parsing.anchors.get(name)
    if target is None:
        if name in parsing.anchors:
            parsing.report(place, path, f"*{name}", f"&{name} holds itself", "Write the value out.")
        else:
            parsing.report(place, path, f"*{name}", f"there is no &{name} above", "Quote a text that begins with `*`.")
        return Node(None, place)
    node, values = target
    parsing.count(place, path, values)
    parsing.limit_depth(place, len(path) + _height(node))
    return replace(node, place=place)


def _height(node: Node) -> int:
    return max((1 + _height(child) for _, child in children(node)), default=0)


def _read_scalar(parsing: _Parsing, event: yaml.ScalarEvent, place: Location, path: PathParts) -> Node:
    text, quoted = event.value, event.style is not None
    value: Any = text
    if _SURROGATE.search(text):
        parsing.report(place, path, quote(text), "half a surrogate pair is not a character", "Remove the escape.")
        value = _SURROGATE.sub("\ufffd", text)
    elif not quoted and event.tag is None:
        try:
            value = resolve(text)
        except ValueError as error:
            parsing.report(place, path, one_line(text), f"{one_line(text)} {error}", "Write a finite number.")
    return Node(value, place, text=text, quoted=quoted)


def _read_entries(parsing: _Parsing, path: PathParts) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    while not parsing.parser.check_event(yaml.MappingEndEvent):
        key = _read_value(parsing, (*path, "?"))
        name = _read_key(parsing, key, path, next(reversed(entries.values()), None))
        value = _read_value(parsing, (*path, name or "?"))
        if name is not None and name in entries:
            first = entries[name].key or key.place
            where = "" if first.setting else f" at line {first.line}, column {first.column}"
            reason = f"already written{where}"
            parsing.report(key.place, (*path, name), quote(plain(value)), reason, "Remove one of the two.")
        elif name is not None:
            entries[name] = replace(value, key=key.place)
    parsing.parser.get_event()
    return entries


def _read_key(parsing: _Parsing, key: Node, path: PathParts, before: Node | None) -> str | None:
    if key.value == "<<":
        reason, remedy = "YAML 1.2 has no merge key `<<`", "Use extends, or write the keys out."
        parsing.report(key.place, (*path, "<<"), "<<", reason, remedy)
        return None
    if isinstance(key.value, str):
        return key.value
    given = key.text or quote(plain(key))
    remedy = f"Put quotes around it: {key.text!r}." if key.text else "Write a word before the colon."
    if before and type(before.value) is int and type(key.value) is int:
        whole = before.value != 0 and len(key.text) == 3
        remedy = f"A comma ends a value in braces: of a number write {before.text}{'' if whole else '.'}{key.text}."
    parsing.report(key.place, (*path, given), one_line(given), f"the key {one_line(given)} is not a text", remedy)
    return None
