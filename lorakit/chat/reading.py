"""What the user types, put together from lines: a line that ends with a backslash goes on, and so does a text between
two `\"\"\"`."""

import re
from collections.abc import Callable

from lorakit.errors import UserError

BLOCK = '"""'
_OPENS_BLOCK = re.compile(r'(\s*/\w+\s+|\s*)"""')
_COMMAND = re.compile(r"/(\S*)\s*(.*)", re.DOTALL)


class Entry(str):
    """One question or command. `verbatim`: its text is a question, even where it begins as a command does."""

    verbatim = False

    def command(self) -> tuple[str, str] | None:
        """The name of the command and what follows it; None for a question."""
        match = None if self.verbatim else _COMMAND.fullmatch(self)
        return (match[1], match[2].strip()) if match else None


def read_entry(read_line: Callable[[bool], str]) -> Entry:
    """The next entry, maybe an empty one. `read_line` gives the next line without its line break, and is told whether
    it goes on an entry; its EOFError ends the reading. A UserError where a block has no end."""
    line = read_line(False)
    if opening := _OPENS_BLOCK.match(line):
        entry = Entry(opening[1].lstrip() + _read_block(line[opening.end() :], read_line))
        entry.verbatim = not opening[1].strip()
        return entry
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read_line(True))
        except EOFError:
            break
    return Entry("\n".join(lines))


def _read_block(first: str, read_line: Callable[[bool], str]) -> str:
    lines = [first]
    while BLOCK not in lines[-1]:
        try:
            lines.append(read_line(True))
        except EOFError as error:
            raise UserError(f"a text that begins with {BLOCK} has no {BLOCK} at its end. Nothing was sent.") from error
    last, _, after = lines[-1].partition(BLOCK)
    if after.strip():
        raise UserError(f"there is more after the {BLOCK} that ends a text: {after.strip()!r}. Nothing was sent.")
    lines[-1] = last
    whole = lines[1:] if len(lines) > 1 and not lines[0].strip() else lines
    return "\n".join(whole[:-1] if len(whole) > 1 and not whole[-1].strip() else whole)
