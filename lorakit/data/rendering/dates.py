"""The day that a chat template takes for today, where it writes one (`strftime_now`)."""

import copy
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

_FORMAT = re.compile(r"""(["'])((?:(?!\1)[^\\\n]|\\.)*%(?:(?!\1)[^\\\n]|\\.)*)\1""")


def clock_on(day: str) -> Callable[[str], str]:
    """What transformers gives a template as `strftime_now`, on another day, at 00:00."""
    return datetime.fromisoformat(day).strftime


def dated(tokenizer: Any, day: str | None) -> Any:
    """A tokenizer whose template writes this day whoever renders it: transformers lets no function through to one. The
    tokenizer itself where there is no day."""
    if day is None:
        return tokenizer
    made, own = copy.copy(tokenizer), tokenizer.chat_template
    templates = {name: _dated(text, day) for name, text in own.items()} if isinstance(own, dict) else _dated(own, day)
    made.chat_template = templates
    return made


def _dated(template: str, day: str) -> str:
    """The template with the dates that it may ask for written above it: all of its texts that have a `%`."""
    clock = clock_on(day)
    found = sorted({text for _, text in _FORMAT.findall(template)})
    dates = json.dumps({text: clock(text) for text in found}, ensure_ascii=False)
    return f"{{%- set strftime_now = {dates}.get -%}}{template}"
