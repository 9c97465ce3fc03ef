"""Where a text stands in its row, and what a check found there."""

import re
from dataclasses import dataclass

# A fence that is not closed runs to the end; code between single or double backticks stays on its line.
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|``?[^`\n]+``?", re.DOTALL)


@dataclass(frozen=True)
class TextFinding:
    """What a check found in a text: in words that are the same for all rows alike, and what this text has."""

    what: str
    case: str = ""
    fixable: bool = True


@dataclass(frozen=True)
class TextContext:
    """A text's place: the role that says it ("text" for a document), its field, and the texts beside it.

    `prompts` are the texts of the row that are not the assistant's, `texts` are all of them.
    """

    role: str
    field: str
    prompts: tuple[str, ...]
    texts: tuple[str, ...]


def prose_and_code(text: str) -> list[str]:
    """The text in parts: those at even places are prose, those at odd places code between backticks."""
    if "`" not in text and "~~~" not in text:
        return [text]
    parts = []
    end = 0
    for code in _CODE.finditer(text):
        parts += [text[end : code.start()], code.group()]
        end = code.end()
    return [*parts, text[end:]]
