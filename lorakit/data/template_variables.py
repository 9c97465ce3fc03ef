"""Variables of a chat template: what its source reads besides the conversation, such as `enable_thinking`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import meta, nodes
from jinja2.environment import Environment

from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest

_KEY = "model.template_variables"


@dataclass(frozen=True)
class Variables:
    """The variables that a template reads, with the constants that it compares each with.

    `given`: the names that lorakit and the tokenizer give values to.
    """

    constants: Mapping[str, Sequence[Any]]
    given: frozenset[str]

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse values of variables that the template does not read, or that are given anyway.

        Raises:
            UserError: there is such a variable.
        """
        for name in values:
            if name in self.constants:
                continue
            if name in self.given:
                raise UserError(f"{_KEY}.{name}: lorakit gives the chat template this itself. Leave it out.")
            meant, known = nearest(name, self.constants), ", ".join(sorted(self.constants))
            raise UserError(
                f"{_KEY}.{name}: the chat template reads no variable of this name. "
                + (f"Did you mean {meant}? " if meant else "")
                + (f"It reads {known}." if known else "It reads none: leave the key out.")
            )

    def to_try(self, besides: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """One value of one variable at a time: false, true, and the constants; without those that are set."""
        for name in sorted(self.constants.keys() - besides.keys()):
            for value in (False, True, *self.constants[name]):
                yield {name: value}


def variables_of(environment: Environment, sources: Sequence[str], given: frozenset[str]) -> Variables:
    """The variables that a template's sources read. jinja2 also counts names that are set in one branch only: a name
    that the template sets before it first reads it is its own."""
    constants: dict[str, list[Any]] = {}
    for source in sources:
        tree = environment.parse(source)
        own, read = set[str](), set[str]()
        for name in _names_in_order(tree):
            if name.ctx != "load":
                own.add(name.name)
            elif name.name not in own:
                read.add(name.name)
        for found in read & meta.find_undeclared_variables(tree) - given:
            constants.setdefault(found, [])
        for compare in tree.find_all(nodes.Compare):
            if isinstance(compare.expr, nodes.Name) and compare.expr.name in constants:
                constants[compare.expr.name] += [value for operand in compare.ops for value in _values(operand.expr)]
    return Variables(constants, given)


def written(values: Mapping[str, Any]) -> str:
    """Values as a recipe writes them: `{enable_thinking: false}`."""
    words = {True: "true", False: "false", None: "null"}
    pairs = (
        f"{name}: {words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in values.items()
    )
    return f"{{{', '.join(pairs)}}}"


def _names_in_order(node: nodes.Node) -> Iterator[nodes.Name]:
    """Names in the order in which they are read and set: the value of an assignment before its target."""
    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    for child in reversed(children) if isinstance(node, nodes.Assign) else children:
        yield from _names_in_order(child)


def _values(node: nodes.Node) -> list[Any]:
    """The constants of a comparison: jinja2 makes one constant of a list of them."""
    value = node.value if isinstance(node, nodes.Const) else ()
    return list(value) if isinstance(value, list | tuple) else [value]
