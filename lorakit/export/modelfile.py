"""Modelfiles, as Ollama writes and reads them (its parser/parser.go): instructions with a value each. A value between
quotes is taken as it is, without escapes, but for letters that cannot be printed, which are dropped."""

from collections.abc import Iterable

from lorakit.errors import UserError
from lorakit.recipe.problem import quote

Instruction = tuple[str, str]
"""Its name in capitals, of a parameter with that one's name (`PARAMETER stop`), and its value."""

_QUOTES = '"""'


def write_modelfile(instructions: Iterable[Instruction]) -> str:
    """The text of a Modelfile. A UserError for a value that would be read as another one."""
    written = []
    for name, value in instructions:
        quotes = _QUOTES if name in ("SYSTEM", "TEMPLATE") else '"' if name == "PARAMETER stop" else ""
        line = f"{name} {quotes}{value}{quotes}\n"
        if read_modelfile(line) != [(name, value)]:
            bad = next((letter for letter in value if not (letter.isprintable() or letter in " \t\r\n")), _QUOTES)
            raise UserError(
                f"ollama: a Modelfile cannot hold {quote(bad)}, which is in its {name} {quote(value)}. "
                "Train without it, or export gguf and send the system prompt with each request."
            )
        written.append(line)
    return "\n".join(written)


def read_modelfile(text: str) -> list[Instruction]:
    """The instructions of a Modelfile, as Ollama would read them."""
    instructions, rest = [], text
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        if name.upper() == "PARAMETER":
            parameter, _, rest = rest.partition(" ")
            name = f"PARAMETER {parameter}"
        value, rest = _read_value(rest)
        instructions.append((name if name.startswith("PARAMETER ") else name.upper(), value))
    return instructions


def _read_value(text: str) -> tuple[str, str]:
    """The value at the beginning of a text, which ends with a line and outside of quotes, and what follows it."""
    read = ""
    for at, letter in enumerate(text):
        if letter in "\r\n" and (value := _unquote(read.strip())) is not None:
            return value, text[at:]
        if letter.isprintable() or letter in " \t\r\n":
            read += letter
    value = _unquote(read.strip())
    if value is None:
        raise UserError(f"a Modelfile's value does not end: {quote(read)}. Write the quotes behind it.")
    return value, ""


def _unquote(text: str) -> str | None:
    for quotes in (_QUOTES, '"'):
        if text.startswith(quotes):
            closed = text.endswith(quotes) and len(text) >= 2 * len(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text
