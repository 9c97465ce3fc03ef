"""Products and powers in chat templates: the operations that can keep the interpreter busy for ever at once."""

from typing import Any

from jinja2 import Environment, Template
from jinja2.sandbox import SandboxedEnvironment

_MOST_BITS = 1 << 16


def with_small_numbers(environment: Environment, source: str) -> Template:
    """The template of this source, in which products and powers of numbers of thousands of digits are errors."""
    assert isinstance(environment, SandboxedEnvironment)
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table = {**environment.binop_table, "*": _product, "**": _power}
    return environment.from_string(source)


def _product(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check(left.bit_length() + right.bit_length())
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check(left.bit_length() * max(right, 0))
    return left**right


def _check(bits: int) -> None:
    if bits > _MOST_BITS:
        raise OverflowError("a number of thousands of digits")
