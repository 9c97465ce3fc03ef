"""Go's text/template, as much of it as the TEMPLATE of a Modelfile here is written in: what proves that such a template
writes what the chat template writes. Everything else in a template is an error.

After the documentation of Go's package text/template: an assigned variable keeps its value after the block, `{{-` and
`-}}` take away the white space before and behind the action, and a defined template sees its argument alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.export.go_expression import GoTemplateError, Run, Scope, Token, parse_pipeline, read_tokens, unquote

_ACTION = re.compile(r"\{\{(-(?=\s))?((?:\"(?:\\.|[^\"\\\n])*\"|`[^`]*`|(?!\}\})[^\"`])*?)((?<=\s)-)?\}\}", re.DOTALL)
_SPACE = " \t\r\n"  # what {{- and -}} take away


@dataclass
class GoTemplate:
    """A parsed template. `defined`: those that it defines itself, by name."""

    source: str
    defined: dict[str, list[Run]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parts = list(_split(self.source))[::-1]
        self._else_if: list[Token] = []
        self._body, end = self._block()
        if end:
            raise GoTemplateError(f"unexpected {{{{{end}}}}}")

    def render(self, data: Mapping[str, Any]) -> str:
        """What the template writes for data of texts, numbers, lists and objects."""
        return self._execute(self._body, _bytes_of(data)).decode("utf-8")

    def _execute(self, body: list[Run], dot: Any) -> bytes:
        scope = Scope(dot, [{"$": dot}], [])
        _run(body, scope)
        return b"".join(scope.written)

    def _block(self) -> tuple[list[Run], str]:
        """The actions up to `end` or `else`, which is the second of the pair."""
        body: list[Run] = []
        while self._parts:
            kind, source = self._parts.pop()
            if kind == "text":
                body.append(_write_text(source.encode()))
                continue
            tokens = list(read_tokens(source))[::-1]
            word = tokens[-1][1] if tokens and tokens[-1][0] == "word" else ""
            if word in ("end", "else"):
                if tokens[:-1] and tokens[-2][1] == "if":  # {{else if x}} is {{else}}{{if x}}, with one end for both
                    self._else_if = tokens[:-2]
                    return body, "else if"
                return body, word
            body.append(self._action(word, tokens))
        return body, ""

    def _action(self, word: str, tokens: list[Token]) -> Run:
        handlers = {"if": self._if, "range": self._range, "define": self._define, "template": self._template}
        if word in handlers:
            tokens.pop()
            return handlers[word](tokens)
        if len(tokens) > 1 and tokens[-1][0] == "variable" and tokens[-2][1] in ("=", ":="):
            (_, name), (_, sign) = tokens.pop(), tokens.pop()
            return _assign(name, sign == ":=", parse_pipeline(tokens))
        return _write(parse_pipeline(tokens))

    def _branches(self) -> tuple[list[Run], list[Run]]:
        body, end = self._block()
        other: list[Run] = []
        if end == "else if":
            other = [self._if(self._else_if)]
        elif end == "else":
            other, end = self._block()
            if end != "end":
                raise GoTemplateError("an {{else}} that no {{end}} follows")
        elif end != "end":
            raise GoTemplateError("an {{if}} or {{range}} that no {{end}} follows")
        return body, other

    def _if(self, tokens: list[Token]) -> Run:
        condition = parse_pipeline(tokens)
        body, other = self._branches()
        return lambda scope: _run(body if condition(scope) else other, scope.inner(scope.dot))

    def _range(self, tokens: list[Token]) -> Run:
        names = []
        while len(tokens) > 1 and tokens[-1][0] == "variable" and tokens[-2][1] in (",", ":="):
            names.append(tokens.pop()[1])
            if tokens.pop()[1] == ":=":
                break
        values = parse_pipeline(tokens)
        body, other = self._branches()

        def run(scope: Scope) -> None:
            items = values(scope)
            if not isinstance(items, list):
                raise GoTemplateError(f"range can't iterate over {items!r}")
            for at, item in enumerate(items):
                inner = scope.inner(item)
                inner.variables[-1].update(zip(names, [item] if len(names) == 1 else [at, item], strict=False))
                _run(body, inner)
            if not items:
                _run(other, scope.inner(scope.dot))

        return run

    def _define(self, tokens: list[Token]) -> Run:
        name = unquote(tokens.pop()[1]).decode()
        self.defined[name], end = self._block()
        if end != "end" or tokens:
            raise GoTemplateError(f"the template {name!r} does not end with {{{{end}}}}")
        return lambda scope: None

    def _template(self, tokens: list[Token]) -> Run:
        name, given = unquote(tokens.pop()[1]).decode(), parse_pipeline(tokens)

        def run(scope: Scope) -> None:
            if name not in self.defined:
                raise GoTemplateError(f"template {name!r} not defined")
            scope.written.append(self._execute(self.defined[name], given(scope)))

        return run


def _split(source: str) -> Iterator[tuple[str, str]]:
    at, trims = 0, False
    for action in _ACTION.finditer(source):
        text = source[at : action.start()]
        text = text.lstrip(_SPACE) if trims else text
        yield "text", text.rstrip(_SPACE) if action[1] else text
        yield "action", action[2]
        at, trims = action.end(), bool(action[3])
    text = source[at:]
    if "{{" in text:
        raise GoTemplateError(f"not an action: {text[text.index('{{') :][:60]!r}")
    yield "text", text.lstrip(_SPACE) if trims else text


def _write_text(text: bytes) -> Run:
    return lambda scope: scope.written.append(text)


def _assign(name: str, declares: bool, value: Run) -> Run:
    def run(scope: Scope) -> None:
        (scope.variables[-1] if declares else scope.find(name))[name] = value(scope)

    return run


def _write(value: Run) -> Run:
    def run(scope: Scope) -> None:
        text = value(scope)
        if not isinstance(text, bytes):
            raise GoTemplateError(f"only texts are written, not {text!r}")
        scope.written.append(text)

    return run


def _run(body: list[Run], scope: Scope) -> None:
    for step in body:
        step(scope)


def _bytes_of(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Mapping):
        return {key: _bytes_of(inner) for key, inner in value.items()}
    return [_bytes_of(inner) for inner in value] if isinstance(value, list) else value
