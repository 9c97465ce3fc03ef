"""Rows that teach facts which change, such as prices, dates and versions: retrieval keeps those, training does not."""

import re
from collections import Counter
from collections.abc import Sequence

# What is asked for where the answer will be another one in a year.
_ASKED = re.compile(
    r"\b(?:current(?:ly)?|latest|newest|up[- ]to[- ]date|as of (?:now|today)|today'?s?|this (?:week|month|year|quarter)"
    r"|prices?|costs?|fees?|exchange rate|interest rate|discount|in stock|availab(?:le|ility)"
    r"|(?:opening|business|office) hours|phone number|release date|deadline|due date|version number|which version"
    r"|who is (?:the|our) \w*\s?(?:ceo|cto|cfo|president|chancellor|prime minister|chair\w*|head|director|manager))\b",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"https?://\S+|\b[\w.]+@[\w.]+\b"
    r"|[$€£¥]\s?\d[\d.,]*|\b\d[\d.,]*\s?(?:usd|eur|gbp|dollars?|euros?|pounds?|%)"
    r"|\b(?:19|20)\d\d\b|\b\d{1,2}[./-]\d{1,2}[./-]\d{2,4}\b|\bv?\d+\.\d+(?:\.\d+)*\b"
    r"|\b\d{1,2}:\d\d\b|\b\d{1,2}\s?[ap]\.?m\b|\+?\d[\d ()-]{7,}\d",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<=\s)[A-Z][\w'-]*|\w*\d\w*")
# Prompts alike but for a name, from which on they are taken for a table in disguise.
_ALIKE = 5


def changing(texts: Sequence[tuple[str, str]]) -> list[int]:
    """The places of those (prompt, answer) that teach a value which the prompt does not give and which will change.

    Either the prompt asks for what changes, or five prompts and more are the same but for a name and each has another
    value. A heuristic for English; tasks whose values stand in the prompt (extraction, arithmetic) are left alone.
    """
    values = [_own_values(prompt, answer) for prompt, answer in texts]
    forms = [_form(prompt) for prompt, _ in texts]
    kinds: dict[str, set[str]] = {}
    for form, found in zip(forms, values, strict=True):
        if form and found:
            kinds.setdefault(form, set()).add(" ".join(sorted(found)))
    many = Counter(form for form, found in zip(forms, values, strict=True) if found)
    tables = {form for form, own in kinds.items() if many[form] >= _ALIKE and len(own) > many[form] // 2}
    return [
        at
        for at, ((prompt, _), found) in enumerate(zip(texts, values, strict=True))
        if found and (_ASKED.search(prompt) or forms[at] in tables)
    ]


def _own_values(prompt: str, answer: str) -> set[str]:
    """The values of an answer that its prompt does not give."""
    return {found for found in _VALUE.findall(answer) if found not in prompt}


def _form(prompt: str) -> str:
    """A short prompt with its names taken out; empty where it has none, or numbers, or is long."""
    if len(prompt) > 300 or re.search(r"\d", prompt):
        return ""
    form, names = _NAME.subn("_", prompt)
    return form if names else ""
