"""How a stage reports what it does, without knowing who listens."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work whose end is known."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more units are done; `note` is what the user should see beside the bar."""


class Progress(Protocol):
    """What a stage may tell its caller. `lorakit.console` is the terminal form."""

    def say(self, text: str) -> None:
        """State one fact, on one line."""

    def warn(self, text: str) -> None:
        """State one thing that the user should look at."""

    def bar(self, label: str, total: int, done: int = 0, unit: str = "") -> AbstractContextManager[Bar]:
        """Work of `total` units (0: nobody knows), of which `done` are already behind us; `unit` may be "bytes"."""


class _SilentBar:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


class Silent:
    """A listener that keeps quiet, for library use and tests."""

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0, unit: str = "") -> Iterator[Bar]:
        yield _SilentBar()
