"""What YAML's parser says, in words for people who do not write parsers."""

from typing import NamedTuple

import yaml


class Explanation(NamedTuple):
    """A syntax error. `opening`: the mistake is where the construct begins, not where the parser gave up."""

    reason: str
    remedy: str
    opening: bool = False


# The first entry whose words are all in the parser's message wins. The messages are those of PyYAML's scanner.py
# and parser.py.
_UNCLOSED = Explanation("this quote is never closed", "Write the closing quote.", opening=True)
_ESCAPE = Explanation("a backslash in double quotes begins an escape", "Use single quotes, or write two backslashes.")
EXPLANATIONS: tuple[tuple[tuple[str, ...], Explanation], ...] = (
    (("'\\t'",), Explanation("a tab is used where YAML wants spaces", "Replace the tab by spaces.")),
    (("quoted scalar", "unexpected end of stream"), _UNCLOSED),
    (("quoted scalar", "unexpected document separator"), _UNCLOSED),
    (("unknown escape character",), _ESCAPE),
    (("expected escape sequence",), _ESCAPE),
    (
        ("mapping values are not allowed",),
        Explanation(
            "a second `: ` stands where no key can be",
            "Put quotes around a text that holds `: `, or correct the indentation.",
        ),
    ),
    (
        ("expected ',' or ']'",),
        Explanation("this list lacks a comma or its closing `]`", "Write the missing one.", opening=True),
    ),
    (
        ("expected ',' or '}'",),
        Explanation("this mapping lacks a comma or its closing `}`", "Write the missing one.", opening=True),
    ),
    (
        ("could not find expected ':'",),
        Explanation("this is not `key: value`", "Write a colon and a space after the key.", opening=True),
    ),
    (
        ("block mapping", "block end"),
        Explanation(
            "this line does not fit the indentation above it", "Give all keys of a section the same indentation."
        ),
    ),
    (
        ("block collection", "block end"),
        Explanation("this line does not fit the list above it", "Give all `- ` of a list the same indentation."),
    ),
    (
        ("cannot start any token",),
        Explanation("no value can begin with this character", "Put quotes around the text."),
    ),
    (
        ("sequence entries are not allowed",),
        Explanation("a list cannot begin after a key on the same line", "Put each `- ` on its own line."),
    ),
)


def explain(error: yaml.YAMLError) -> tuple[Explanation, yaml.Mark | None]:
    """What is wrong, what to write, and where."""
    context = getattr(error, "context", None) or ""
    message = f"{context} {getattr(error, 'problem', None) or error}"
    mark = getattr(error, "problem_mark", None)
    for words, explanation in EXPLANATIONS:
        if all(word in message for word in words):
            opening = getattr(error, "context_mark", None) if explanation.opening else None
            return explanation, opening or mark
    first_line = message.strip().splitlines()[0]
    return Explanation(f"this is not YAML ({first_line})", "Correct the line, or put quotes around the text."), mark
