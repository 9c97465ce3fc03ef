"""A chat template's source: where a model's files have it, the date it writes, the variables it reads. Without
transformers."""

import copy
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest

_TEXT_WITH_PERCENT = re.compile(r"""(["'])((?:(?!\1)[^\\\n]|\\.)*%(?:(?!\1)[^\\\n]|\\.)*)\1""")
# `{% generation %}` marks answers for transformers; jinja2 alone knows no such tag.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_MAX_BITS = 1 << 16


def read_templates(folder: Path | None, template: Path | None) -> dict[str, str]:
    """The chat template in a model's folder, or `template` instead: `default`, and for some models others by name;
    empty where there is none."""
    file = template or (folder / "chat_template.jinja" if folder else None)
    if file and file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    given = _read_config(folder).get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    named = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    return {one["name"]: one["template"] for one in named if {"name", "template"} <= one.keys()}


def check_template_variables(folder: Path | None, template: Path | None, values: Mapping[str, Any]) -> None:
    """A UserError for values of variables that the chat template in a model's folder, or `template` instead, does not
    read. A template that is not here, or is damaged, is left to the run."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = json.dumps
    tokens = (name for name, value in _read_config(folder).items() if name.endswith("_token") and value)
    given = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
    sources = [_GENERATION.sub("", source) for source in read_templates(folder, template).values()]
    try:
        variables = find_variables(environment, sources, frozenset({*given, *environment.globals, *tokens}))
    except TemplateSyntaxError:
        return
    if sources:
        variables.check(values)


def _read_config(folder: Path | None) -> dict[str, Any]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def writes_date(templates: Any) -> bool:
    """Whether a chat template, or one of several by name, writes today's date."""
    return "strftime_now" in str(templates)


def check_template_date(given: str | None, writes: bool) -> None:
    """A UserError for a `model.template_date` where the template writes no date, and for null where it writes it."""
    if writes and given is None:
        raise UserError("model.template_date: null: the chat template writes a date. Write auto, or a day.")
    if not writes and given not in ("auto", None):
        raise UserError(f"model.template_date: {given}: the chat template writes no date. Leave the key out.")


def clock_at(day: str) -> Callable[[str], str]:
    """What transformers gives a template as `strftime_now`, on another day, at 00:00."""
    return datetime.fromisoformat(day).strftime


def with_fixed_date(tokenizer: Any, day: str | None) -> Any:
    """A copy of the tokenizer whose template always writes this day; the tokenizer itself where there is no day. The
    dates that the template may ask for (all of its texts with a `%`) are written above it."""
    if day is None:
        return tokenizer

    def fix_date(template: str) -> str:
        texts = sorted({text for _, text in _TEXT_WITH_PERCENT.findall(template)})
        dates = json.dumps({text: clock_at(day)(text) for text in texts}, ensure_ascii=False)
        return f"{{%- set strftime_now = {dates}.get -%}}{template}"

    changed, given = copy.copy(tokenizer), tokenizer.chat_template
    is_dict = isinstance(given, dict)
    changed.chat_template = {name: fix_date(one) for name, one in given.items()} if is_dict else fix_date(given)
    return changed


def compile_bounded(environment: Environment, source: str) -> Template:
    """Compile a template in which products and powers of numbers of thousands of digits are errors: these alone can
    keep the interpreter busy where no timer interrupts it."""
    assert isinstance(environment, SandboxedEnvironment)
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table = {
        **environment.binop_table,
        "*": _limit_bits(operator.mul, lambda left, right: left.bit_length() + right.bit_length()),
        "**": _limit_bits(operator.pow, lambda left, right: left.bit_length() * max(right, 0)),
    }
    return environment.from_string(source)


def _limit_bits(operate: Callable[[Any, Any], Any], count_bits: Callable[[int, int], int]) -> Callable[[Any, Any], Any]:
    def limited(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and count_bits(left, right) > _MAX_BITS:
            raise OverflowError("a number of thousands of digits")
        return operate(left, right)

    return limited


@dataclass(frozen=True)
class TemplateVariables:
    """The variables that a template reads besides the conversation, such as `enable_thinking`. `constants`: by
    variable, what the template compares it with. `given`: the names that lorakit and the tokenizer set."""

    constants: Mapping[str, Sequence[Any]]
    given: frozenset[str]

    def check(self, values: Mapping[str, Any]) -> None:
        """A UserError for values of variables that the template does not read, or that are given anyway."""
        for name in [name for name in values if name not in self.constants]:
            key = f"model.template_variables.{name}"
            if name in self.given:
                raise UserError(f"{key}: lorakit gives the chat template this itself. Leave it out.")
            meant, known = nearest(name, self.constants), ", ".join(sorted(self.constants))
            remedy = f"It reads {known}." if known else "It reads none: leave the key out."
            remedy = f"Did you mean {meant}? {remedy}" if meant else remedy
            raise UserError(f"{key}: the chat template reads no variable of this name. {remedy}")

    def to_try(self, set_already: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """One value of one unset variable at a time: false, true, and the constants."""
        for name in sorted(self.constants.keys() - set_already.keys()):
            for value in (False, True, *self.constants[name]):
                yield {name: value}


def find_variables(environment: Environment, sources: Sequence[str], given: frozenset[str]) -> TemplateVariables:
    """The variables that a template's sources read, without names that are set before they are first read."""
    constants: dict[str, list[Any]] = {}
    for source in sources:
        tree = environment.parse(source)
        assigned, read = set[str](), set[str]()
        for name in _names_in_order(tree):
            if name.ctx != "load":
                assigned.add(name.name)
            elif name.name not in assigned:
                read.add(name.name)
        for variable in read & meta.find_undeclared_variables(tree) - given:
            constants.setdefault(variable, [])
        for compare in tree.find_all(nodes.Compare):
            if isinstance(compare.expr, nodes.Name) and compare.expr.name in constants:
                for operand in compare.ops:
                    # jinja2 makes one constant of a list of constants
                    value = operand.expr.value if isinstance(operand.expr, nodes.Const) else []
                    constants[compare.expr.name] += value if isinstance(value, list | tuple) else [value]
    return TemplateVariables(constants, given)


def _names_in_order(node: nodes.Node) -> Iterator[nodes.Name]:
    """Names in the order in which they are read and set: the value of an assignment before its target."""
    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    for child in reversed(children) if isinstance(node, nodes.Assign) else children:
        yield from _names_in_order(child)


def as_yaml(values: Mapping[str, Any]) -> str:
    """Values as a recipe writes them: `{enable_thinking: false}`."""
    words = {name: json.dumps(one) if one is None or isinstance(one, bool) else one for name, one in values.items()}
    return f"{{{', '.join(f'{name}: {word}' for name, word in words.items())}}}"
