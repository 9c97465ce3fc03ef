"""The kinds of value that recipe fields share: paths, numbers that mean two things, and words of tables."""

import functools
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from lorakit.recipe.data_files import DATA_SUFFIXES
from lorakit.registry import AnyTable


@dataclass(frozen=True)
class PathRole:
    """Annotation of a string that names something on disk, relative to the file in which it is written.

    `or_hub`: a string that is not a path is a hub id. `suffixes`: endings that only a path has. `or_folder`: a folder
    will do as well as a file. `of_data`: it names a data file, a folder of them, or a pattern such as `data/*.jsonl`.
    `or_template`: a word without a dot or a slash names a chat template of lorakit's. `example`: what an error
    suggests. `inlined`: the key beside it that takes the file's text when a recipe is loaded.
    """

    example: str
    or_hub: bool = False
    suffixes: tuple[str, ...] = ()
    or_folder: bool = False
    of_data: bool = False
    or_template: bool = False
    inlined: str = ""


@dataclass(frozen=True)
class Wording:
    """Annotation that replaces the generated description of what a field accepts, and the example of an error."""

    text: str
    example: str


def _check_day(text: str) -> str:
    if text == "auto" or date.fromisoformat(text).isoformat() == text:  # a ValueError is pydantic's as well
        return text
    raise ValueError("no day of the calendar")


Day = Annotated[str, AfterValidator(_check_day), Wording("auto, or a day such as 2026-01-31", "2026-01-31")]

NotEmpty = Annotated[str, Field(min_length=1)]

BaseModelRef = Annotated[
    NotEmpty, PathRole("HuggingFaceTB/SmolLM2-135M-Instruct", or_hub=True, suffixes=(".gguf",), or_folder=True)
]
DataRef = Annotated[
    NotEmpty, PathRole("data/train.jsonl", or_hub=True, suffixes=DATA_SUFFIXES, or_folder=True, of_data=True)
]
ChatTemplateRef = Annotated[NotEmpty, PathRole("template.jinja", or_template=True)]
JinjaPath = Annotated[NotEmpty, PathRole("prompt.jinja", inlined="jinja_text")]
SystemPath = Annotated[NotEmpty, PathRole("prompt.txt", inlined="system")]
AdapterRef = Annotated[NotEmpty, PathRole("runs/support-answers", or_folder=True)]
OutputDir = Annotated[NotEmpty, Wording("a path", "runs/my-run")]

ExportWord = Annotated[NotEmpty, Wording("an export target such as gguf:q4_k_m", "gguf:q4_k_m")]

RunName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    Wording("a name of letters, digits, `.`, `_` and `-` that begins with a letter or digit", "my-run"),
]
Targets = Annotated[
    NotEmpty | Annotated[list[NotEmpty], Field(min_length=1)],
    Wording("all-linear, attention, mlp, a list of module names, or a regular expression", "all-linear"),
]

_TemplateWord = str | bool | int | float | None
TemplateValue = Annotated[
    _TemplateWord | list[_TemplateWord],
    Wording("a text, a number, true or false, null, or a list of these", "false"),
]

LayerRange = Annotated[str, Field(pattern=r"^[0-9]+-[0-9]+$"), Wording("a range such as 8-15", "8-15")]
LayerNumbers = Annotated[list[Annotated[int, Field(ge=0)] | LayerRange], Field(min_length=1)]

Auto = Literal["auto"]
CleanAction = Literal["off", "report", "fix", "error"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Warmup = Annotated[
    Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)],
    Wording("a fraction of the steps from 0 to below 1, or a whole number of steps", "0.03"),
]
Interval = Annotated[
    Share | PositiveInt,
    Wording("a fraction of the run above 0 and below 1, or a whole number of steps above 0", "0.1"),
]


def is_split(held_out: Any) -> bool:
    """Whether the held-out rows are a share or a number of the training rows, instead of rows of their own."""
    return isinstance(held_out, float | int)


def entry_names(value: Any) -> list[str]:
    """The entries that a value names: one, unless the recipe is wrong."""
    if isinstance(value, str):
        return [value]
    return [name for name in type(value).model_fields if getattr(value, name) is not None]


def entry_name(value: Any) -> str:
    """The entry's name, or a word such as `auto` that the key takes besides."""
    return entry_names(value)[0]


def entry_settings(table: AnyTable, value: Any) -> Any:
    """The entry's settings, its defaults where the value is a word; None for an entry, or a word, that has none."""
    if not isinstance(value, str):
        return getattr(value, entry_name(value))
    return _defaults(table, value)


@functools.cache  # asked for each row
def _defaults(table: AnyTable, name: str) -> Any:
    settings = table[name].settings if name in table else None
    return settings() if settings else None
