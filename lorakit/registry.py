"""Tables of plain functions: every choice that a recipe makes by one word.

A table names the module of lorakit's own entries, which is imported when the table is first read. Other packages add
entries through the entry-point group `lorakit.<table>`; a recipe can only name entries, never code to import.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict

Unit = Literal["share", "points", "ratio", "nats", "perplexity"]
"""What a score is measured in."""


class Section(BaseModel):
    """What a recipe's sections and the entries' settings share: unknown keys are errors, values are never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Spec:
    """One word that a recipe may write, and the function that it stands for."""

    function: Callable[..., Any]
    summary: str
    name: str
    _: KW_ONLY
    settings: type[Section] | None = None
    """The section of the entry's settings, all with defaults."""
    mistakes: Callable[..., Iterator[tuple[tuple[str | int, ...], str, str]]] | None = None
    """Settings (and an adapter's section) -> the path in the settings, the reason and the remedy of each mistake."""
    needs_settings: str = ""  # an example of the entry with settings, where the word alone says too little


@dataclass(frozen=True)
class NamedColumns:
    """The columns that the texts of a format's settings name. `needed`: a row must have them; `optional`: the texts do
    without; `answers`: those in what is trained; `unread`: those of the format's `optional` that these settings leave
    out; `every`: a program in the texts may read all columns."""

    needed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    answers: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    every: bool = False


@dataclass(frozen=True)
class FormatSpec(Spec):
    """A format: record (and settings) -> conversation, text or tokens."""

    _: KW_ONLY
    columns: tuple[str | tuple[str, ...], ...]
    """Those by which `format: auto` recognises it; of a tuple of names a row has one. Without any it never does."""
    optional: tuple[str, ...] = ()  # the other columns that it reads
    conversations: bool = True  # whether its rows are conversations, so that a system prompt may be put above them
    named: Callable[[Any], NamedColumns] | None = None  # its settings -> the columns that their texts name


@dataclass(frozen=True)
class AdapterSpec(Spec):
    """An adapter kind: the recipe's adapter section, the chosen modules -> PEFT's configuration."""

    _: KW_ONLY
    quantizations: tuple[str, ...] | None = None  # of the base, that it goes with; None: all
    quantizes: str | None = None  # the quantization that it gives to the base itself
    optimizers: tuple[str, ...] | None = None  # that it goes with; None: all
    refuses: tuple[str, ...] = ()  # keys of the recipe that it would ignore
    experts: bool = False  # whether it adapts the fused weights of mixture-of-experts layers
    keeps_initial: bool = False  # whether a frozen copy of the initial adapter stays beside it
    rate: Callable[[Any], tuple[float, str]] | None = None
    """Adapter section -> the learning rate that suits it, as a share of plain LoRA's, and the source."""
    numbers: Callable[[Any, int, Any], int] | None = None
    """Adapter section, rank, weight -> how many numbers are trained; None: rank (in + out)."""
    initialize: Callable[..., None] | None = None
    """(model, settings, given): what is done to a fresh adapter."""
    callback: Callable[..., Any] | None = None
    """(model, settings, steps) -> what takes part in every step of a training of so many steps."""


@dataclass(frozen=True)
class QuantizerSpec(Spec):
    """A quantization: the recipe's model section, dtype -> transformers' quantization configuration, or None."""


@dataclass(frozen=True)
class MetricSpec(Spec):
    """A metric: answer, reference (and settings) -> scores by name; the empty name is the metric itself."""

    _: KW_ONLY
    unit: Unit = "share"
    higher: bool | None = True  # whether more is better; None: neither is
    batched: bool = False  # whether the function takes all answers and all references at once
    pool: Callable[[Any], Any] | None = None  # what the rows add, summed -> the score; None: the mean of their scores


@dataclass(frozen=True)
class ExporterSpec(Spec):
    """An export target: a lorakit.export.source.ExportSource, the word after the colon, a folder to fill, a Progress ->
    what export.json says of the files."""

    _: KW_ONLY
    weights: Literal["merged", "adapter", "either"]  # what it is made from; either: the adapter if it fits, else merged
    arguments: tuple[str, ...] = ()  # the words that may follow the colon
    default: str | None = None  # the word where none is written, "": the entry chooses; None: one must be written
    modules: tuple[str, ...] = ()  # those of the extra `export` without which it cannot be made


@dataclass(frozen=True)
class TrackerSpec(Spec):
    """A tracker: its settings, if it has any, and a lorakit.track.trackers.TrackedRun -> an OpenRun."""

    _: KW_ONLY
    modules: tuple[str, ...] = ()  # those of the extra of its name without which it does not work


Fields = ParamSpec("Fields")
S = TypeVar("S", bound=Spec)


class Table(Generic[Fields, S]):
    """The entries of one kind of choice, in the order they were registered."""

    def __init__(
        self, spec: Callable[Concatenate[Callable[..., Any], str, Fields], S], name: str, noun: str, home: str
    ) -> None:
        self.name, self.noun = name, noun
        self._spec, self._home = spec, home
        self._entries: dict[str, S] = {}
        self._loaded = False

    def register(
        self, *name: Fields.args, **fields: Fields.kwargs
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a function to add it under a name; the first line of its docstring is the entry's documentation.

        The other fields are those of the table's spec: a misspelt one is a type error.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            summary = (function.__doc__ or "").strip().partition("\n")[0]
            entry = self._spec(function, summary, *name, **fields)
            if entry.name in self._entries:
                raise ValueError(f"the {self.noun} {entry.name!r} is registered twice")
            if not summary:
                raise ValueError(f"the {self.noun} {entry.name!r} needs a docstring, whose first line documents it")
            self._entries[entry.name] = entry
            return function

        return add

    def __iter__(self) -> Iterator[S]:
        return iter(self._load().values())

    def __getitem__(self, name: str) -> S:
        return self._load()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def names(self) -> list[str]:
        """Every word that a recipe may write here."""
        return list(self._load())

    def _load(self) -> dict[str, S]:
        if not self._loaded:
            self._loaded = True
            importlib.import_module(self._home)
            for point in importlib.metadata.entry_points(group=f"lorakit.{self.name}"):
                point.load()
        return self._entries


FORMATS = Table(FormatSpec, "formats", "format", "lorakit.data.formats")
ADAPTERS = Table(AdapterSpec, "adapters", "adapter kind", "lorakit.model.adapters")
QUANTIZERS = Table(QuantizerSpec, "quantizers", "quantization", "lorakit.model.quantization_config")
METRICS = Table(MetricSpec, "metrics", "metric", "lorakit.evaluate.metrics")
EXPORTERS = Table(ExporterSpec, "exporters", "export target", "lorakit.export")
TRACKERS = Table(TrackerSpec, "trackers", "tracker", "lorakit.track")
AnyTable = Table[..., Any]
