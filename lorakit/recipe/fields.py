"""The kinds of value that recipe fields share: words of a table, paths, and numbers that mean two things."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from lorakit.tables import ADAPTERS, FORMATS, METRICS, QUANTIZERS, Table


@dataclass(frozen=True)
class WordOf:
    """Annotation of a string that must be an entry of `table` or one of `extra`."""

    table: Table
    extra: tuple[str, ...] = ()

    def names(self) -> list[str]:
        return [*self.extra, *self.table.names()]

    def check(self, word: str) -> str:
        if word not in self.names():
            raise PydanticCustomError("unknown_word", "no such {noun}", {"noun": self.table.noun})
        return word


def word_of(table: Table, *extra: str) -> Any:
    """The type of a field whose value is an entry of `table` or one of `extra`."""
    words = WordOf(table, extra)
    return Annotated[str, AfterValidator(words.check), words]


@dataclass(frozen=True)
class PathRole:
    """Annotation of a string that names something on disk, relative to the file in which it is written.

    `or_hub`: a string that is no path is a hub id. `suffixes`: endings that only a path has.
    """

    or_hub: bool = False
    suffixes: tuple[str, ...] = ()


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def _fraction_or_count(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    fraction = isinstance(value, float) and 0 <= value < 1
    if not ((whole and value >= 0) or fraction):
        raise PydanticCustomError("fraction_or_count", "neither a fraction nor a whole number")
    return value


def _interval(value: Any) -> Any:
    if value == 0:
        raise PydanticCustomError("fraction_or_count", "an interval of zero never ends")
    return value


@dataclass(frozen=True)
class Says:
    """Annotation that replaces the generated description of what a field accepts."""

    text: str


Format = word_of(FORMATS, "auto")
AdapterKind = word_of(ADAPTERS)
Quantization = word_of(QUANTIZERS)
Metric = word_of(METRICS)

BaseModelRef = Annotated[str, Field(min_length=1), PathRole(or_hub=True, suffixes=(".gguf",))]
DataRef = Annotated[str, Field(min_length=1), PathRole(or_hub=True, suffixes=DATA_SUFFIXES)]
FilePath = Annotated[str, Field(min_length=1), PathRole()]

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Warmup = Annotated[
    float | int, BeforeValidator(_fraction_or_count), Says("a fraction of the steps from 0 to below 1, or a number of steps")
]
Interval = Annotated[
    float | int,
    BeforeValidator(_interval),
    BeforeValidator(_fraction_or_count),
    Says("a fraction of the run above 0 and below 1, or a number of steps"),
]
