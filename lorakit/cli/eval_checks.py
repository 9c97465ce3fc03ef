"""Which options of `lorakit eval` go together: each belongs to one of the four things that it does."""

from collections.abc import Mapping
from typing import Any

from lorakit.errors import UserError

_WHOLE = "an evaluation"
"""Scoring on rows, which is done where no option asks for another thing."""

_OTHERS = ("--tasks", "--sheet", "--ratings")
"""The options that ask for another thing."""

_FOR: dict[str, tuple[str, ...]] = {
    "--data": (_WHOLE,),
    "--metrics": (_WHOLE,),
    "--rows": (_WHOLE,),
    "--fail-under": (_WHOLE,),
    "--diagnose": (_WHOLE,),
    "--general": (_WHOLE,),
    "--baseline": (_WHOLE, "--tasks"),
    "--output": (_WHOLE, "--tasks"),
    "--max-new-tokens": (_WHOLE, "--sheet"),
    "--no-cache": (_WHOLE, "--sheet"),
    "--quantizations": (_WHOLE, "--tasks", "--sheet"),
    "--tasks-path": ("--tasks",),
    "--limit": ("--tasks",),
    "--chat-template": ("--tasks",),
    "--allow-code": ("--tasks",),
    "--questions": ("--sheet",),
    "--overwrite": ("--sheet",),
    "--key": ("--ratings",),
}
"""What each option is for; --seed, --json and --quiet are for everything."""

_PAIRS = (
    ("--ratings", "--ratings FILE", "--key", "--key FILE, the sheet's key.json"),
    ("--sheet", "--sheet DIR", "--questions", "--questions FILE"),
)


def check_together(models: list[str], options: Mapping[str, Any]) -> None:
    """Refuse options that say nothing together. `options`: what each was given as; None, False or [] is not given.

    Raises:
        UserError: an option says nothing here, or lacks another one.
    """
    given = [name for name, value in options.items() if not (value is None or value is False or value == [])]
    for first, first_in_words, second, second_in_words in _PAIRS:
        if (first in given) != (second in given):
            there, lacking = (first, second_in_words) if first in given else (second, first_in_words)
            raise UserError(f"{there} requires {lacking}.")
    asked = [name for name in _OTHERS if name in given]
    if asked == ["--sheet", "--ratings"]:
        raise UserError("--ratings and --sheet exclude each other: a sheet is written first, and rated then.")
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other. Give one of them, and the other after it.")
    done = asked[0] if asked else _WHOLE
    for name in given:
        meant = _FOR.get(name, (done,))
        if done not in meant:
            raise UserError(f"{name}: is for {' and '.join(meant)}" + (f", not for {done}." if asked else "."))
    if not models and done != "--ratings":
        raise UserError("nothing is named to be scored. Give the folder of a run, such as runs/NAME.")


def quantizations_of(named: str | None) -> list[str]:
    """The words of `--quantizations a,b`, each once.

    Raises:
        UserError: one is no quantization.
    """
    from lorakit.registry import QUANTIZERS

    words = [word.strip() for word in named.split(",")] if named is not None else []
    for word in words:
        if word not in QUANTIZERS:
            raise UserError(f"--quantizations: {word!r} is none. Write some of {', '.join(QUANTIZERS.names())}.")
    return list(dict.fromkeys(words))
