"""What commands of earlier versions are called today."""

from typing import Any

_COMBINE = "lorakit combine RUN RUN --method METHOD --weights 0.5,0.5 --output DIR"
_EXTRACT = "lorakit extract TUNED BASE --rank 32 --output DIR"
_BENCHMARK = "lorakit benchmark RUN --tasks gsm8k,mmlu"
_SHEET = "lorakit rate sheet RUN --questions FILE --output DIR"
_REPORT = "lorakit rate report FILE... --key FILE"

# A command with an option that it no longer has (A B: more arguments than it takes) -> what to write instead.
_SPELLINGS = {
    "merge A B": _COMBINE,
    "merge --method": _COMBINE,
    "merge --weights": _COMBINE,
    "merge --density": f"{_COMBINE} --density 0.5",
    "merge --seed": f"{_COMBINE} --seed 1",
    "merge --into-base": f"{_COMBINE} --into-base",
    "merge --rank": f"{_EXTRACT}` or `{_COMBINE} --rank 32",
    "merge --extract": _EXTRACT,
    "merge --keep-whole": f"{_EXTRACT} --keep-whole",
    "eval --tasks": _BENCHMARK,
    "eval --tasks-path": f"{_BENCHMARK} --tasks-path DIR",
    "eval --limit": f"{_BENCHMARK} --limit 100",
    "eval --chat-template": f"{_BENCHMARK} --chat-template",
    "eval --allow-code": f"{_BENCHMARK} --allow-code",
    "eval --sheet": _SHEET,
    "eval --questions": _SHEET,
    "eval --overwrite": f"{_SHEET} --overwrite",
    "eval --ratings": _REPORT,
    "eval --key": _REPORT,
}


def new_spelling(error: Any) -> str | None:
    """A sentence that names today's command, if a usage error is about a command of an earlier version."""
    option = getattr(error, "option_name", None)
    if option is None and "unexpected extra argument" in error.message:
        option = "A B"
    old = f"{error.ctx.info_name if error.ctx else ''} {option}"
    return f"`lorakit {old}` is now `{_SPELLINGS[old]}`." if old in _SPELLINGS else None
