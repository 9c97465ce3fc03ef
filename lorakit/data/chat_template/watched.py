"""Whether a chat template looks into what messages say, or only writes it down.

Most templates write contents as they are, maybe without the white space around them. Then all conversations with the
same roles have the same text but for the contents, and the text of one gives that of the others. That has to be known
for certain: a template is handed contents that note each look into them, and its source must have nothing that could
look without being noted.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.environment import Environment

_FILTERS = {"trim", "length", "count", "default", "d", "first", "last", "list", "selectattr", "rejectattr", "items"}
_FUNCTIONS = {"raise_exception", "strftime_now", "range", "namespace", "dict"}
# Tests that Python makes without asking the text; those that `selectattr` is trusted with.
_UNNOTED_TESTS = {"in", "sameas"}
_SELECTIONS = {"equalto", "eq", "==", "ne", "!=", "defined", "undefined", "none"}


class Content(str):
    """What a message says, on its way through a template; `_looks` collects the names of what looked into it.

    Joining it to other text is no look, nor is taking the white space from around it; into what comes of joining,
    every further step is.
    """

    _looks: list[str]
    _joined = False

    def __add__(self, other: str) -> "Content":
        return _joined(self, str.__add__(self, other))

    def __radd__(self, other: str) -> "Content":
        return _joined(self, str.__add__(other, self))

    def __str__(self) -> "Content":
        return self

    def strip(self, chars: str | None = None) -> str:
        if self._joined or chars is not None:
            self._looks.append("strip")
        return content(str.strip(self, chars), self._looks)


def content(text: str, looks: list[str]) -> Content:
    """A text that notes the looks into it."""
    made = Content(text)
    made._looks = looks
    return made


def _joined(part: Content, text: str) -> Content:
    made = content(text, part._looks)
    made._joined = True
    return made


def _noted(name: str) -> Callable[..., Any]:
    def method(self: Content, *arguments: Any, **options: Any) -> Any:
        self._looks.append(name)
        return getattr(str, name)(self, *arguments, **options)

    return method


_UNNOTED = {
    *dir(object), "__add__", "__getnewargs__", "strip",
} - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__repr__", "__format__"}  # fmt: skip
for _name in set(dir(str)) - _UNNOTED:
    setattr(Content, _name, _noted(_name))


@functools.lru_cache(maxsize=16)
def notes_every_look(environment: Environment, source: str) -> bool:
    """Whether each look that this template takes into a `Content` is noted by it.

    What could escape: Python's own methods that are given a content as an argument, and texts that blocks and macros
    are made into before something looks at them.
    """
    tree = environment.parse(source)
    written, macros = set(_written(tree)), {macro.name for macro in tree.find_all(nodes.Macro)}
    bound = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"} | macros
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    for name in tree.find_all(nodes.Name):
        if name.name in macros and name.ctx == "load" and id(name) not in called:
            return False  # a macro under another name
    return not bound & _FUNCTIONS and all(_is_open(node, written, macros) for node in _all(tree))


def _all(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _all(child)


def _written(tree: nodes.Node) -> Iterator[int]:
    """The expressions that go straight into the text."""
    waiting: list[nodes.Node] = [expression for node in tree.find_all(nodes.Output) for expression in node.nodes]
    while waiting:
        node = waiting.pop()
        yield id(node)
        if isinstance(node, nodes.Concat | nodes.Add | nodes.CondExpr):
            waiting += [child for child in node.iter_child_nodes() if child is not getattr(node, "test", None)]


def _is_open(node: nodes.Node, written: set[int], macros: set[str]) -> bool:
    match node:
        case nodes.Concat():
            return id(node) in written
        case nodes.Filter(name="tojson"):
            return id(node) in written
        case nodes.Filter(name="selectattr" | "rejectattr"):
            given = [getattr(argument, "value", None) for argument in node.args]
            return _is_constant(node) and (len(given) < 2 or given[1] in _SELECTIONS)
        case nodes.Filter():
            return node.name in _FILTERS and (node.name in ("default", "d") or _is_constant(node))
        case nodes.Test():
            return _is_constant(node) and node.name not in _UNNOTED_TESTS
        case nodes.Mod():
            return isinstance(node.right, nodes.Const) and not isinstance(node.right.value, str)
        case nodes.Operand(op="in" | "notin"):
            return True  # the comparison around it is looked at
        case nodes.Compare():
            members = [operand.expr for operand in node.ops if operand.op in ("in", "notin")]
            plain = all(isinstance(one, nodes.List | nodes.Tuple) for one in members)
            return not members or isinstance(node.expr, nodes.Const) or plain
        case nodes.Call(node=nodes.Name()):
            name = node.node.name  # type: ignore[attr-defined]
            if name == "strftime_now" and not _is_constant(node):
                return False
            return name in _FUNCTIONS or (name in macros and id(node) in written)
        case nodes.Call(node=nodes.Getattr()):
            return _is_constant(node)
        case nodes.CallBlock():  # {% generation %} marks, which give their text as it is
            return isinstance(node.call.node, nodes.ExtensionAttribute)
        case nodes.Call():
            return isinstance(node.node, nodes.ExtensionAttribute)
        case nodes.AssignBlock() | nodes.FilterBlock() | nodes.Import() | nodes.FromImport():
            return False
        case nodes.Include() | nodes.Extends() | nodes.Block():
            return False
        case _:
            return True


def _is_constant(node: Any) -> bool:
    """Whether all arguments are constants."""
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    values = [*node.args, *(pair.value for pair in node.kwargs)]
    return all(isinstance(value, nodes.Const) for value in values)
