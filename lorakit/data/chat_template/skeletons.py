"""Skeletons: the text of all conversations of one shape, for templates that write contents down as they are.

The first conversation with certain roles is rendered in full, with all checks, on marks in place of its contents. Where
the template looked into none of them, the text between the marks is that of every conversation of this shape, and so
are the trained turns. That must be certain: the marks log each look into them, and the template's source may have
nothing that could look without being logged.
"""

import functools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes
from jinja2.environment import Environment

from lorakit.data.chat_template.template import ChatTemplate
from lorakit.data.chat_template.templated_row import RenderedText, TemplatedRow, TurnSpan
from lorakit.data.rows import Message, RowError

# White space that no template writes, and in the middle all that an escaping or a change of case would touch.
_LEADING, _TRAILING = "\x0b\x1c", "\x1d\x0c"
_CORE = "\ue000<\"Aa&'\\\n\t{number}\ue001"
_MARK = re.compile("([\x0b\x1c]*)\ue000<\"Aa&'\\\\\n\t(\\d+)\ue001([\x1d\x0c]*)")
_MAX_MESSAGES = 64


@dataclass(frozen=True)
class Skeleton:
    """One text: `pieces` stand around `contents`, each the number of a message and whether it loses the white space
    around it. `spans`: the start and the end of each turn (a piece, and a character in it), and the turn."""

    pieces: list[str]
    contents: list[tuple[int, bool]]
    spans: list[tuple[tuple[int, int], tuple[int, int], TurnSpan]]
    everything: bool
    note: str

    def fill(self, contents: Sequence[str]) -> RenderedText:
        """The text of a conversation with these contents; a UnicodeEncodeError for half of a surrogate pair."""
        parts, starts, length = [self.pieces[0]], [0], len(self.pieces[0])
        for (number, strip), piece in zip(self.contents, self.pieces[1:], strict=True):
            content = contents[number].strip() if strip else contents[number]
            parts += (content, piece)
            starts.append(length + len(content))
            length = starts[-1] + len(piece)
        text = "".join(parts)
        text.isascii() or text.encode()
        spans = tuple(
            TurnSpan(starts[first] + start, starts[last] + end, turn.stop, turn.trained)
            for (first, start), (last, end), turn in self.spans
        )
        return RenderedText(text, spans, self.everything, note=self.note)


class _WatchingTemplate(ChatTemplate):
    """A template that is given contents which log each look into them."""

    seeks_remedies = False
    looks: list[str]

    def write(self, messages: list[Message], *arguments: Any, **options: Any) -> str:
        watched = [{**message, "content": watch(message["content"], self.looks)} for message in messages]
        return super().write(watched, *arguments, **options)


def shape_of(messages: Sequence[Message]) -> tuple[Any, ...] | None:
    """What two conversations must share to have one skeleton; None for one that has more than roles and contents."""
    if len(messages) > _MAX_MESSAGES:
        return None
    shape = []
    for message in messages:
        if len(message) > 2 and not (len(message) == 3 and "train" in message):
            return None
        if not message["content"].strip():
            return None
        shape.append((message["role"], message.get("train", True)))
    return tuple(shape)


def make_skeletons(row: TemplatedRow, render: Callable[[TemplatedRow], list[RenderedText]]) -> list[Skeleton] | None:
    """The texts of every conversation of this shape; None where each must be rendered in full (with `render`)."""
    template = row.template
    # What is known of the template is taken over: asking it anew would look into the samples.
    _ = template.stop, template.frame, template.thoughts, template.without_thoughts
    compiled, _ = template.compiled
    if not logs_every_look(compiled.environment, template.source):
        return None
    watching = object.__new__(_WatchingTemplate)
    watching.__dict__.update(template.__dict__, looks=[])
    marked = [
        {**message, "content": f"{_LEADING}{_CORE.format(number=number)}{_TRAILING}"}
        for number, message in enumerate(row.messages)
    ]
    try:
        texts = render(TemplatedRow(marked, None, watching, inserted=0))
    except RowError:
        return None
    skeletons = [skeleton for text in texts if (skeleton := _skeleton(text))]
    contents = {content for skeleton in skeletons for content in skeleton.contents}
    stripped_in_one_text_only = len(contents) > len({number for number, _ in contents})
    if watching.looks or len(skeletons) < len(texts) or stripped_in_one_text_only:
        return None
    return skeletons


def _skeleton(rendered: RenderedText) -> Skeleton | None:
    pieces, contents, starts = [], [], [0]
    for mark in _MARK.finditer(rendered.text):
        around = (mark[1], mark[3])
        if around not in ((_LEADING, _TRAILING), ("", "")):
            return None
        pieces.append(rendered.text[starts[-1] : mark.start()])
        contents.append((int(mark[2]), around == ("", "")))
        starts.append(mark.end())
    pieces.append(rendered.text[starts[-1] :])
    if any(part in piece for piece in pieces for part in "\ue000\ue001\x0b\x1c\x1d\x0c"):
        return None

    def place(edge: int) -> tuple[int, int]:
        piece = bisect_right(starts, edge) - 1
        return piece, edge - starts[piece]

    spans = [(place(span.start), place(span.end), span) for span in rendered.spans]
    if any(at > len(pieces[piece]) for *places, _ in spans for piece, at in places):
        return None  # an edge inside a content
    return Skeleton(pieces, contents, spans, rendered.everything, rendered.note)


class WatchedText(str):
    """A content on its way through a template; `_looks` collects the names of what looked into it. Joining it to other
    text is no look, nor is taking the white space from around it; into what comes of joining, every further step is."""

    _looks: list[str]
    _joined = False

    def __add__(self, other: str) -> "WatchedText":
        return watch(str.__add__(self, other), self._looks, joined=True)

    def __radd__(self, other: str) -> "WatchedText":
        return watch(str.__add__(other, self), self._looks, joined=True)

    def __str__(self) -> "WatchedText":
        return self

    def strip(self, chars: str | None = None) -> str:
        if self._joined or chars is not None:
            self._looks.append("strip")
        return watch(str.strip(self, chars), self._looks)


def watch(text: str, looks: list[str], joined: bool = False) -> WatchedText:
    """A text that adds each look into it to `looks`."""
    watched = WatchedText(text)
    watched._looks, watched._joined = looks, joined
    return watched


def _logged(name: str) -> Callable[..., Any]:
    def method(self: WatchedText, *arguments: Any, **options: Any) -> Any:
        self._looks.append(name)
        return getattr(str, name)(self, *arguments, **options)

    return method


_UNLOGGED = {
    *dir(object), "__add__", "__getnewargs__", "strip",
} - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__repr__", "__format__"}  # fmt: skip
for _name in set(dir(str)) - _UNLOGGED:
    setattr(WatchedText, _name, _logged(_name))

_FILTERS = {"trim", "length", "count", "default", "d", "first", "last", "list", "selectattr", "rejectattr", "items"}
_FUNCTIONS = {"raise_exception", "strftime_now", "range", "namespace", "dict"}
# Tests that Python makes without asking the text; those that `selectattr` is trusted with.
_UNLOGGED_TESTS = {"in", "sameas"}
_SELECTIONS = {"equalto", "eq", "==", "ne", "!=", "defined", "undefined", "none"}


@functools.lru_cache(maxsize=16)
def logs_every_look(environment: Environment, source: str) -> bool:
    """Whether each look that this template takes into a `WatchedText` is logged. What could escape: Python's methods
    that are given a content as an argument, and texts that blocks are made into before something looks at them."""
    tree = environment.parse(source)
    written = set(_written(tree))
    bound = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    return not bound & _FUNCTIONS and all(_is_open(node, written) for node in tree.find_all(nodes.Node))


def _written(tree: nodes.Node) -> Iterator[int]:
    """The expressions that go straight into the text."""
    waiting: list[nodes.Node] = [expression for node in tree.find_all(nodes.Output) for expression in node.nodes]
    while waiting:
        node = waiting.pop()
        yield id(node)
        if isinstance(node, nodes.Concat | nodes.Add | nodes.CondExpr):
            waiting += [child for child in node.iter_child_nodes() if child is not getattr(node, "test", None)]


_CLOSED = (
    nodes.AssignBlock, nodes.FilterBlock, nodes.Macro, nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends,
    nodes.Block
)  # fmt: skip


def _is_open(node: nodes.Node, written: set[int]) -> bool:
    match node:
        case nodes.Concat() | nodes.Filter(name="tojson"):
            return id(node) in written
        case nodes.Filter(name="selectattr" | "rejectattr"):
            given = [getattr(argument, "value", None) for argument in node.args]
            return _is_constant(node) and (len(given) < 2 or given[1] in _SELECTIONS)
        case nodes.Filter():
            return node.name in _FILTERS and (node.name in ("default", "d") or _is_constant(node))
        case nodes.Test():
            return _is_constant(node) and node.name not in _UNLOGGED_TESTS
        case nodes.Mod():
            return isinstance(node.right, nodes.Const) and not isinstance(node.right.value, str)
        case nodes.Compare():
            members = [operand.expr for operand in node.ops if operand.op in ("in", "notin")]
            plain = all(isinstance(one, nodes.List | nodes.Tuple) for one in members)
            return not members or isinstance(node.expr, nodes.Const) or plain
        case nodes.Call(node=nodes.Name()):
            name = node.node.name  # type: ignore[attr-defined]
            return name in _FUNCTIONS and (name != "strftime_now" or _is_constant(node))
        case nodes.Call(node=nodes.Getattr()):
            return _is_constant(node)
        case nodes.CallBlock():  # {% generation %} marks, which give their text as it is
            return isinstance(node.call.node, nodes.ExtensionAttribute)
        case nodes.Call():
            return isinstance(node.node, nodes.ExtensionAttribute)
        case _:
            return not isinstance(node, _CLOSED)


def _is_constant(node: Any) -> bool:
    """Whether all arguments are constants."""
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    values = [*node.args, *(pair.value for pair in node.kwargs)]
    return all(isinstance(value, nodes.Const) for value in values)
