"""What the checks of single texts share: findings, the text's place in its row, prose and code."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# A fence that is not closed runs to the end; code between single or double backticks stays on its line.
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|``?[^`\n]+``?)", re.DOTALL)


@dataclass(frozen=True)
class RowFinding:
    """One thing that a check found in one text of a row.

    `what` is the same for all rows alike, so that they can be counted; `case` is this row's. `fixed`: the text that the
    check returns no longer has it. `clean` fills in the check and `field`, the text, as "message 2 (assistant)".
    """

    what: str
    case: str = ""
    fixed: bool = True
    check: str = ""
    field: str = ""


@dataclass(frozen=True)
class TextContext:
    """A text's role ("text" for a document), and the row's texts: all, and `prompts`, not the assistant's."""

    role: str
    prompts: tuple[str, ...]
    texts: tuple[str, ...]


def normalize_words(text: str) -> str:
    """The text in lower case, its words separated by single spaces."""
    return " ".join(text.lower().split())


def first_few(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (" and others" if len(shown) > 4 else "")


def prose_and_code(text: str) -> list[str]:
    """The text in parts: those at even places are prose, those at odd places code between backticks."""
    return _CODE.split(text) if "`" in text or "~~~" in text else [text]
