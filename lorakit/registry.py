"""Tables of plain functions: every choice that a recipe makes by one word.

A table names the module where lorakit's own entries live. The module is imported when the table is first read, so that
the recipe's schema, `--help`, the docs and the error messages all read the same entries. Other packages add entries
through the entry-point group `lorakit.<table>`; a recipe can only name what is in a table, never code to import.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One word that a recipe may write, and the function behind it."""

    name: str
    function: Callable[..., Any]
    summary: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Table:
    """The entries of one kind of choice, in the order they were registered."""

    name: str
    noun: str
    home: str
    _entries: dict[str, Entry] = field(default_factory=dict)
    _loaded: bool = False

    def register(self, name: str, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a function to add it; the first line of its docstring is the entry's documentation.

        `facts` are what the readers of this table ask of each entry besides.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._entries:
                raise ValueError(f"the {self.noun} {name!r} is registered twice")
            if not function.__doc__:
                raise ValueError(f"the {self.noun} {name!r} has no docstring: its first line is its documentation")
            self._entries[name] = Entry(name, function, function.__doc__.strip().splitlines()[0], facts)
            return function

        return add

    def __iter__(self) -> Iterator[Entry]:
        self._load()
        return iter(self._entries.values())

    def __getitem__(self, name: str) -> Entry:
        self._load()
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def names(self) -> list[str]:
        """Every word that a recipe may write here."""
        return [entry.name for entry in self]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        importlib.import_module(self.home)
        for point in importlib.metadata.entry_points(group=f"lorakit.{self.name}"):
            point.load()


FORMATS = Table("formats", "format", "lorakit.data.formats")
ADAPTERS = Table("adapters", "adapter kind", "lorakit.model.adapters")
QUANTIZERS = Table("quantizers", "quantization", "lorakit.model.quantizers")
METRICS = Table("metrics", "metric", "lorakit.evaluate.metrics")
