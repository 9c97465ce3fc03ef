"""Regular expressions over the names of modules, which may search for ever."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lorakit.bounds import TooLong, bounded
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

_SECONDS = 10


def match_pattern(pattern: str, names: Iterable[str], key: str) -> set[str]:
    """The names that a pattern, written at `key`, fits as a whole; UserError where it is none, or searches too long."""
    try:
        with bounded(_SECONDS):
            compiled = re.compile(pattern)
            return {name for name in names if compiled.fullmatch(name)}
    except TooLong as error:
        reason = f"{one_line(repr(pattern))} searches the modules' names for more than {_SECONDS} s"
        remedy = "One that repeats a repetition, such as (a+)+, tries every way to share out a name: write it simpler."
        raise UserError(f"{key}: the pattern {reason}. {remedy}") from error
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: {one_line(repr(pattern))} is not a regular expression: {error}.") from error


def check_patterns(config: Any, names: Sequence[str], key: str) -> None:
    """Try the patterns of PEFT's configuration of an adapter on a model's modules, as PEFT does without a bound."""
    whole = [getattr(config, field, None) for field in ("target_modules", "exclude_modules")]
    parts = [part for field in ("rank_pattern", "alpha_pattern") for part in getattr(config, field, None) or ()]
    for pattern in [text for text in whole if isinstance(text, str)]:
        match_pattern(pattern, names, key)
    for pattern in parts:
        if any(sign in pattern for sign in "*+{"):  # nothing else repeats
            match_pattern(rf"(.*\.)?({pattern})", names, key)
