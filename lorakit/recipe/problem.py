"""Problems: what is wrong with a recipe, where it is written, and what to write instead."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.amounts import counted
from lorakit.errors import UserError

PathParts = tuple[str | int, ...]

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Location:
    """Where something is written: a position in a file (1-based; 0 is the file as a whole), or a `--set` option."""

    file: Path | None = None
    line: int = 0
    column: int = 0
    setting: str = ""

    def at(self, line: int, column: int) -> "Location":
        """The same origin at another position; a `--set` is one place."""
        return self if self.setting else replace(self, line=line, column=column)

    @property
    def sort_key(self) -> tuple[str, int, int]:
        """By files, in the order of each."""
        return str(self.file), self.line, self.column

    @property
    def folder(self) -> Path:
        """Where relative paths that are written here begin."""
        return self.file.parent if self.file else Path.cwd()

    def __str__(self) -> str:
        if self.setting:
            return f"--set {one_line(self.setting)}"
        name = show_path(self.file or Path())
        return f"{name}:{self.line}:{self.column}" if self.line else name


@dataclass(frozen=True)
class Problem:
    """One mistake. `path` is the dotted name of the key, empty where the whole file is meant."""

    place: Location
    path: str
    value: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        subject = f"{self.path}: " if self.path else ""
        return f"{self.place}: {subject}{self.reason}. {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """The facts for `--json`."""
        place, file = self.place, str(self.place.file) if self.place.file else None
        facts = {"file": file, "line": place.line or None, "column": place.column or None, "set": place.setting or None}
        return facts | {key: getattr(self, key) for key in ("path", "value", "reason", "remedy")}


class RecipeErrors(UserError):
    """A recipe cannot be used. `problems` holds every mistake; the message is one line each and a count."""

    one_a_line = True

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([*map(str, self.problems), f"{counted(len(self.problems), 'problem')}."]))


class LocatedError(UserError):
    """What is wrong with one key, as only the model, the rows or the machine show it."""

    def __init__(self, place: Location, path: str, message: str) -> None:
        self.problems = (Problem(place, path, "", message.removeprefix(f"{path}: "), ""),)
        super().__init__(f"{place}: {message}")


def dotted_name(path: PathParts) -> str:
    """`("data", "train", 1, "path")` -> `data.train[1].path`."""
    keys = [part if isinstance(part, int) or _PLAIN_KEY.fullmatch(part) else repr(_cut(part)) for part in path]
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def quote(value: Any) -> str:
    """A value as an error names it: short, on one line, control characters escaped."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(_cut(value)) if value else "an empty text"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    return str(value)


def one_line(text: str, longest: int = _LONGEST_VALUE) -> str:
    """`text` as a message can hold it: cut, line breaks and control characters escaped."""
    text = _cut(text, longest)
    return text if text.isprintable() else repr(text)[1:-1]


def _cut(text: str, longest: int = _LONGEST_VALUE) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def show_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return one_line(min(relative, str(path), key=len), longest=300)
