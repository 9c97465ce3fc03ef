"""YAML read strictly: version 1.2's core rules, every position remembered, every oddity a problem.

PyYAML's composer supplies the nodes; what they mean is decided here, since its own loader follows YAML 1.1 (`no` is a
boolean, `1e-4` is a text), forgets positions and lets a later duplicate key win.
"""

import math
import os
import re
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from lorakit.recipe.did_you_mean import nearest_file
from lorakit.recipe.problem import Location, PathParts, Problem, dotted_name, one_line, quote, show_path

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 10_000
"""Values in one text, aliases counted at their full size: ten nested aliases can stand for ten billion values."""

# What an unquoted word means: the core rules of YAML 1.2 (section 10.3.2 of its specification).
NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
ENDLESS = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST_NUMBER = 100
_LARGEST_INT = 2**63 - 1

_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")

# A message of PyYAML's scanner.py, parser.py or composer.py, or of _Composer -> what is wrong and what to write, in
# words for people who do not write parsers. The first that fits wins. Of those of _OPENING the mistake is where the
# construct begins, not where the parser gave up.
_OPENING = (
    (r"quoted scalar.*unexpected (end of stream|document)", "this quote is never closed", "Write the closing quote."),
    (r"expected ',' or ']'", "this list lacks a comma or its closing `]`", "Write the missing one."),
    (r"expected ',' or '}'", "this mapping lacks a comma or its closing `}`", "Write the missing one."),
    (r"could not find expected ':'", "this is not `key: value`", "Write a colon and a space after the key."),
)
_EXPLANATIONS = (
    (r"'\\t'", "a tab is used where YAML wants spaces", "Replace the tab by spaces."),
    *_OPENING,
    (r"unknown escape|expected escape", "a backslash in double quotes begins an escape", "Use single quotes."),
    (
        r"mapping values are not",
        "a second `: ` stands where no key can be",
        "Put quotes around the text, or indent it.",
    ),
    (r"block mapping.*block end", "this line does not fit the indentation above it", "Give all keys one indentation."),
    (r"block collection.*block end", "this line does not fit the list above it", "Give all `- ` one indentation."),
    (r"cannot start any token", "no value can begin with this character", "Put quotes around the text."),
    (r"sequence entries are not", "a list cannot begin after a key on the same line", "Put each `- ` on its own line."),
    (r"found undefined alias", "there is no anchor of this name above", "Quote a text that begins with `*`."),
    (r"found duplicate anchor", "an anchor of this name is above already", "Give each its own name."),
    (r"a single document", "a second document begins here", "Keep one document in a file."),
    (r"a tag", "tags are not read", "Remove the word that begins with `!`."),
    (r"too deep", f"values are nested deeper than {MAX_DEPTH} levels", "No setting is that deep; remove the nesting."),
    (r"too many", f"there are more than {MAX_VALUES} values", "A recipe holds settings, not data."),
)


@dataclass(frozen=True)
class Node:
    """One value with its location: a scalar, a dict of nodes or a list of nodes."""

    value: Any
    place: Location
    key: Location | None = None
    """Where the key of this value is written; None for list items and for the whole text."""
    text: str = ""
    """A scalar as it is written, quotes removed."""


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


def node_of(value: Any, place: Location) -> Node:
    """A plain value as if all of it were written in one place."""
    if isinstance(value, dict):
        return Node({key: replace(node_of(child, place), key=place) for key, child in value.items()}, place)
    if isinstance(value, list):
        return Node([node_of(child, place) for child in value], place)
    return Node(value, place, text=str(value))


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
    reason, remedy = "the file has no settings", "Write at least model.base and data.train."
    if node.value is not None:
        given = "a list" if isinstance(node.value, list) else f"the single value {quote(node.value)}"
        reason, remedy = (
            f"the file is {given}, not a mapping",
            "Write `key: value` lines, with a space after each colon.",
        )
    return None, [*problems, Problem(node.place, "", quote(plain(node)), reason, remedy)]


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
    too_large = path.stat().st_size > MAX_BYTES
    return (f"{name} is larger than 1 MB", "A recipe holds settings, not data.") if too_large else None


def read_text(text: str, origin: Location) -> tuple[Node | None, list[Problem]]:
    """Read one document; None when the text cannot be read to its end."""
    if bad := _UNREADABLE.search(text):
        place, name = origin.at(*position(text, bad.start())), f"U+{ord(bad[0]):04X}"
        return None, [Problem(place, "", name, f"the character {name} cannot stand in YAML", "Remove it.")]
    composer = _Composer(text)
    reading = _Reading(origin)
    try:
        root = composer.get_single_node()
        node = reading.convert(root, ()) if root else Node(None, origin.at(1, 1))
        return node, reading.problems
    except yaml.YAMLError as error:
        reason, remedy, mark = _explain(error)
    except RecursionError:
        reason, remedy, mark = _explain(yaml.MarkedYAMLError(problem="too deep", problem_mark=composer.get_mark()))
    except (ValueError, OverflowError):
        # PyYAML hands an escape such as "\UFFFFFFFF" to chr() as it is.
        reason, remedy, mark = "this escape is not a character", "Correct or remove it.", composer.get_mark()
    place = reading.place(mark) if mark else origin.at(1, 1)
    return None, [*reading.problems, Problem(place, "", "", reason, remedy)]


def position(text: str, index: int) -> tuple[int, int]:
    """Line and column of a character, from 1."""
    line_start = max(text.rfind("\n", 0, index), text.rfind("\r", 0, index)) + 1
    return len(re.findall("\r\n|\n|\r", text[:index])) + 1, index - line_start + 1


def _explain(error: yaml.YAMLError) -> tuple[str, str, yaml.Mark | None]:
    message = f"{getattr(error, 'context', None) or ''} {getattr(error, 'problem', None) or error}"
    mark = getattr(error, "problem_mark", None)
    for entry in _EXPLANATIONS:
        if re.search(entry[0], message):
            opening = getattr(error, "context_mark", None) if entry in _OPENING else None
            return entry[1], entry[2], opening or mark
    first_line = message.strip().splitlines()[0]
    return f"this is not YAML ({first_line})", "Correct the line, or put quotes around the text.", mark


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which takes no tags."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="a tag", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


@dataclass
class _Reading:
    """One text being read."""

    origin: Location
    problems: list[Problem] = field(default_factory=list)
    values: int = 0

    def place(self, mark: yaml.Mark) -> Location:
        return self.origin.at(mark.line + 1, mark.column + 1)

    def report(self, place: Location, path: PathParts, value: str, reason: str, remedy: str) -> None:
        self.problems.append(Problem(place, dotted_name(path), value, reason, remedy))

    def convert(self, node: yaml.Node, path: PathParts) -> Node:
        """The value that stands at `path`; an alias is what it stands for."""
        self.values += 1
        if len(path) > MAX_DEPTH or self.values > MAX_VALUES:
            fault = "too deep" if len(path) > MAX_DEPTH else "too many"
            raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark)
        place = self.place(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return Node(self._read_entries(node, path), place)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(item, (*path, index)) for index, item in enumerate(node.value)], place)
        text: str = node.value
        value: Any = text
        if _SURROGATE.search(text):
            self.report(place, path, quote(text), "half a surrogate pair is not a character", "Remove the escape.")
            value = _SURROGATE.sub("\ufffd", text)
        elif getattr(node, "style", None) is None:  # neither in quotes nor a block
            try:
                value = resolve(text)
            except ValueError as error:
                self.report(place, path, one_line(text), f"{one_line(text)} {error}", "Write a finite number.")
        return Node(value, place, text=text)

    def _read_entries(self, node: yaml.MappingNode, path: PathParts) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = self.convert(key_node, (*path, "?"))
            name = self._read_key(key, path, next(reversed(entries.values()), None))
            value = self.convert(value_node, (*path, name or "?"))
            if name is not None and name in entries:
                first = entries[name].key or key.place
                where = "" if first.setting else f" at line {first.line}, column {first.column}"
                remedy = "Remove one of the two."
                self.report(key.place, (*path, name), quote(plain(value)), f"already written{where}", remedy)
            elif name is not None:
                entries[name] = replace(value, key=key.place)
        return entries

    def _read_key(self, key: Node, path: PathParts, before: Node | None) -> str | None:
        if key.value == "<<":
            reason, remedy = "YAML 1.2 has no merge key `<<`", "Use extends, or write the keys out."
            self.report(key.place, (*path, "<<"), "<<", reason, remedy)
            return None
        if isinstance(key.value, str):
            return key.value
        given = key.text or quote(plain(key))
        remedy = f"Put quotes around it: {key.text!r}." if key.text else "Write a word before the colon."
        if before and type(before.value) is int and type(key.value) is int:
            whole = before.value != 0 and len(key.text) == 3
            remedy = f"A comma ends a value in braces: of a number write {before.text}{'' if whole else '.'}{key.text}."
        self.report(key.place, (*path, given), one_line(given), f"the key {one_line(given)} is not a text", remedy)
        return None


def resolve(text: str) -> bool | int | float | str | None:
    """The value of an unquoted word; ValueError for a number that no setting can hold, with the reason."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if ENDLESS.fullmatch(text):
        raise ValueError("is not a finite number")
    if INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # Python refuses to parse very long decimal numbers; they are too large in any case.
        number = int(text, base) if len(text) <= _LONGEST_NUMBER else _LARGEST_INT + 1
        if abs(number) > _LARGEST_INT:
            raise ValueError("is too large a whole number")
        return number
    if FLOAT.fullmatch(text):
        if math.isinf(float(text)):
            raise ValueError("is too large a number")
        return float(text)
    return text


def other_notation(text: str) -> str:
    """The number that is written in another way than YAML's: `0,0001`, `1,000`, `1_000`, `10%`; empty for none."""
    if share := re.fullmatch(r"([0-9]+(?:[.,][0-9]+)?) ?%", text):
        return f"{Decimal(share[1].replace(',', '.')) / 100:f}"
    if re.fullmatch(r"[1-9][0-9]{0,2}([,_][0-9]{3})+(\.[0-9]+)?|[0-9]+(_[0-9]+)+(\.[0-9]+)?", text):
        return text.replace(",", "").replace("_", "")
    return text.replace(",", ".") if re.fullmatch(r"[0-9]+,[0-9]+([eE][-+]?[0-9]+)?", text) else ""
