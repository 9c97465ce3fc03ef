"""Jinja texts of the recipe: what a row says, with conditions and loops. They are rendered in jinja2's
ImmutableSandboxedEnvironment, within bounds of time, memory and length; a value is never read as Jinja."""

import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.bounds import TooLong, bounded
from lorakit.data.formats.places import as_text, did_you_mean, find_value, names_in
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line
from lorakit.registry import NamedColumns

if TYPE_CHECKING:
    from jinja2 import Template

_SECONDS, _MEMORY = 10, 2 << 30  # a text is written in microseconds
# Characters that it may write besides what the row says, and how often it may write that.
_AROUND, _TIMES = 1 << 20, 8
_FIX = "Fix the Jinja text of data.format."
# Tests and filters of what may be absent.
_TAKING_NOTHING = ("defined", "undefined", "default", "d")
ROW = "row"
"""The name of the row itself: `row["Column name"]`."""


class _NullWritten(Exception):
    """A null was to be written as text."""


@functools.lru_cache(maxsize=64)
def compile_jinja(source: str) -> "Template":
    """The compiled text. A `UserError` where compiling does not end; jinja2's TemplateSyntaxError where it is none."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from lorakit.data.template_source import compile_bounded

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        finalize=_as_written,
        trim_blocks=True,  # these two as in chat templates
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    for table, name in ((environment.globals, "lipsum"), (environment.filters, "random")):
        del table[name]  # a row says the same each time
    try:
        with bounded(_SECONDS, _MEMORY):
            return compile_bounded(environment, source)
    except (TooLong, MemoryError) as error:
        raise UserError(f"a Jinja text takes more than {_limit(error)} to compile. {_FIX}") from error


def _as_written(value: Any) -> Any:
    """What a `{{ value }}` writes, by the rules of places."""
    from jinja2 import Undefined

    if value is None:
        raise _NullWritten
    return value if isinstance(value, str | Undefined) else as_text(value, "a value of the Jinja text")


def _limit(error: BaseException) -> str:
    return f"{_SECONDS} s" if isinstance(error, TooLong) else f"{_MEMORY >> 30} GiB of memory"


def jinja_mistake(source: str) -> str | None:
    """Why this is no Jinja text that can be rendered; None where it is one."""
    from jinja2 import TemplateSyntaxError, nodes

    try:
        compiled = compile_jinja(source)
    except TemplateSyntaxError as error:
        return f"not valid Jinja, line {error.lineno}: {one_line(str(error.message).rstrip('.'), 200)}"
    except UserError as error:
        return str(error).partition(". ")[0]
    tree = compiled.environment.parse(source)
    other = next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None)
    return f"line {other.lineno} asks for another file, and a Jinja text stands alone" if other else None


@functools.lru_cache(maxsize=64)
def jinja_columns(source: str) -> NamedColumns:
    """The columns that a Jinja text reads: as variables, and as `row["name"]`. Those that it asks for with `is defined`
    or gives a default are optional."""
    from jinja2 import TemplateSyntaxError, meta, nodes

    try:
        environment = compile_jinja(source).environment
    except (TemplateSyntaxError, UserError):
        return NamedColumns()
    tree = environment.parse(source)
    names = meta.find_undeclared_variables(tree) - environment.globals.keys()
    whole = sum(node.name == ROW for node in tree.find_all(nodes.Name)) if ROW in names else 0
    parts = [
        str(node.arg.value)
        for node in tree.find_all(nodes.Getitem)
        if isinstance(node.node, nodes.Name) and node.node.name == ROW and isinstance(node.arg, nodes.Const)
    ]
    asking = (node for kind in (nodes.Test, nodes.Filter) for node in tree.find_all(kind))
    tested = [node.node for node in asking if node.name in _TAKING_NOTHING]
    optional = {node.name for node in tested if isinstance(node, nodes.Name)}
    optional |= {
        str(node.arg.value) for node in tested if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const)
    }
    read = (names - {ROW}) | set(parts)
    return NamedColumns(frozenset(read - optional), frozenset(read & optional), every=whole > len(parts))


def render_jinja(source: str, record: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    """The text of a row; `missing` stands for columns that are absent or null. A `RowError` where the row lacks what
    the text reads, a `UserError` where the text never ends."""
    from jinja2 import TemplateError, UndefinedError

    values = {**record, **{name: text for name, text in missing.items() if find_value(record, name) is None}}
    try:
        with bounded(_SECONDS, _MEMORY):
            text = compile_jinja(source).render({**values, ROW: values})
            size = len(json.dumps(values, default=str)) if len(text) > _AROUND else 0
    except (TooLong, MemoryError) as error:
        what = f"data.format: its Jinja text takes more than {_limit(error)} to write one row, and may never end"
        raise UserError(f"{what}. {_FIX}") from error
    except _NullWritten as error:
        nulls = [name for name, value in values.items() if value is None]
        reason = "the Jinja text writes a null (test for it, or write missing: {NAME: ...} for what stands there then)"
        raise RowError(reason, f"null here: {one_line(', '.join(map(repr, nulls)), 200)}") from error
    except UndefinedError as error:
        match = re.fullmatch(r"'(.+)' is undefined", str(error))
        near = f", {did_you_mean(match[1], names_in(values))}" if match else ""
        raise RowError(
            "the Jinja text reads what the row does not have", f"{one_line(str(error), 200)}{near}"
        ) from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = one_line(str(error).rstrip("."), 200)
        raise RowError("the Jinja text fails", f"{type(error).__name__}: {reason}") from error
    if len(text) > _AROUND + _TIMES * size:
        raise UserError(f"data.format: its Jinja text writes {len(text):,} characters for one row. {_FIX}")
    return text
