"""Expressions of Go's text/template: what stands in an action `{{ ... }}`, as much of it as `go_template.py` needs.

After the documentation of Go's package text/template: texts are bytes, which `len` and `slice` count; `and` and `or`
give one of their operands, and look no further than they must. Everything else is an error.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:\\.|[^"\\\n])*"|`[^`]*`)|(?P<number>\d+)\b|(?P<variable>\$\w*(?:\.\w+)*)|(?P<field>(?:\.\w+)+|\.)"""
    r"""|(?P<word>\w+)|(?P<sign>:=|[=,()]))""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_LETTERS |= {"a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_UNESCAPED = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}

Token = tuple[str, str]
"""What kind of word it is, and the word."""
Run = Callable[["Scope"], Any]
"""A part of a template: what it gives, or does, in a scope."""


class GoTemplateError(ValueError):
    """A template that is not written in the subset, or that fails."""


def go_text(text: str) -> str:
    """A text as a string of Go, in which everything that a Modelfile would drop is escaped."""
    return '"' + "".join(_escape(letter) for letter in text) + '"'


def _escape(letter: str) -> str:
    if letter in _UNESCAPED or (letter.isprintable() and ord(letter) < 0x10000):
        return _UNESCAPED.get(letter, letter)
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


@dataclass
class Scope:
    """What an action sees: its dot, and the variables of the blocks around it, the innermost last."""

    dot: Any
    variables: list[dict[str, Any]]
    written: list[bytes]

    def find(self, name: str) -> dict[str, Any]:
        """The innermost block that has a variable."""
        for variables in reversed(self.variables):
            if name in variables:
                return variables
        raise GoTemplateError(f"undefined variable {name}")

    def inner(self, dot: Any) -> "Scope":
        return Scope(dot, [*self.variables, {}], self.written)


def read_tokens(source: str) -> Iterator[Token]:
    at, source = 0, source.rstrip()
    while at < len(source):
        token = _TOKEN.match(source, at)
        if token is None:
            raise GoTemplateError(f"not in the subset: {source[at:][:60]!r}")
        assert token.lastgroup is not None
        yield token.lastgroup, token[token.lastgroup]
        at = token.end()


def parse_pipeline(tokens: list[Token], nested: bool = False) -> Run:
    """A command: a function with its operands, or one operand. Takes them from the end of the reversed tokens."""
    name = tokens.pop()[1] if tokens and tokens[-1][0] == "word" and tokens[-1][1] not in _CONSTANTS else ""
    operands: list[Run] = []
    while tokens and tokens[-1][1] != ")":
        operands.append(_operand(tokens))
    if nested != bool(tokens):
        raise GoTemplateError("unbalanced parentheses")
    if not name and len(operands) != 1:
        raise GoTemplateError("an action is one operand, or a function with its operands")
    if not name:
        return operands[0]
    if name in ("and", "or"):
        return _first_operand(name == "or", operands)
    if name not in _FUNCTIONS:
        raise GoTemplateError(f"function {name!r} not defined")
    function = _FUNCTIONS[name]
    return lambda scope: function(*(operand(scope) for operand in operands))


def _operand(tokens: list[Token]) -> Run:
    kind, text = tokens.pop()
    if text == "(":
        value = parse_pipeline(tokens, nested=True)
        tokens.pop()
        return value
    if kind in ("variable", "field"):
        name, *fields = text.split(".")
        return lambda scope: _read_fields(scope.find(name)[name] if name else scope.dot, fields)
    if kind not in ("text", "number") and text not in _CONSTANTS:
        raise GoTemplateError(f"not an operand: {text!r}")
    constant = unquote(text) if kind == "text" else int(text) if kind == "number" else _CONSTANTS[text]
    return lambda scope: constant


def _read_fields(value: Any, names: list[str]) -> Any:
    for name in filter(None, names):
        if not isinstance(value, dict) or name not in value:
            raise GoTemplateError(f"can't evaluate field {name}")
        value = value[name]
    return value


def _first_operand(wanted: bool, operands: list[Run]) -> Run:
    """`or` gives the first operand that is true, `and` the first that is not; else the last. What is true is as in
    Python: no empty text or list, not zero, not false."""

    def run(scope: Scope) -> Any:
        value = None
        for operand in operands:
            value = operand(scope)
            if bool(value) == wanted:
                break
        return value

    return run


def unquote(text: str) -> bytes:
    """The bytes that a string of Go stands for: \\x is a byte, \\u and \\U are characters."""
    if text.startswith("`"):
        return text[1:-1].encode()
    parts, at, inner = [], 0, text[1:-1]
    for escape in _ESCAPE.finditer(inner):
        byte, short, long, letter = escape.groups()
        parts.append(inner[at : escape.start()].encode())
        if letter and letter not in _LETTERS:
            raise GoTemplateError(f"unknown escape \\{letter}")
        parts.append(bytes([int(byte, 16)]) if byte else (_LETTERS.get(letter) or chr(int(short or long, 16))).encode())
        at = escape.end()
    return b"".join([*parts, inner[at:].encode()])


def _equal(first: Any, *others: Any) -> bool:
    _want(bool(others) and all(type(other) is type(first) for other in others), "incompatible types for comparison")
    return first in others


def _at_least(first: Any, other: Any) -> bool:
    _want(type(first) is int and type(other) is int, "incompatible types for comparison")
    return bool(first >= other)


def _length(value: Any) -> int:
    _want(isinstance(value, bytes | list), "error calling len: not a text or list")
    return len(value)


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    _want(isinstance(value, bytes | list), "error calling slice: not a text or list")
    stop = len(value) if end is None else end
    _want(0 <= start <= stop <= len(value), f"error calling slice: index out of range: {start}:{stop}")
    return value[start:stop]


def _index(value: Any, at: Any) -> Any:
    _want(isinstance(value, list) and type(at) is int, f"error calling index: cannot index slice/array with {at!r}")
    _want(0 <= at < len(value), f"error calling index: index out of range: {at}")
    return value[at]


def _want(holds: bool, error: str) -> None:
    if not holds:
        raise GoTemplateError(error)


_CONSTANTS = {"true": True, "false": False}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": _equal,
    "ne": lambda first, other: not _equal(first, other),
    "ge": _at_least,
    "not": lambda value: not value,
    "len": _length,
    "slice": _slice,
    "index": _index,
}
