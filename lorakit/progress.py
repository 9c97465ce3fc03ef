"""How a stage reports what it does, without knowing to whom."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work whose end is known."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more units are done; `note` is shown beside the bar."""


class Progress(Protocol):
    """What a stage reports to its caller. `lorakit.console` is the terminal form."""

    def say(self, text: str) -> None:
        """State one fact, on one line."""

    def warn(self, text: str) -> None:
        """State one thing that the user should look at."""

    def bar(self, label: str, total: int, done: int = 0, unit: str = "") -> AbstractContextManager[Bar]:
        """Work of `total` units (0: unknown), of which `done` are finished already; `unit` may be "bytes"."""


class Silent:
    """A listener that shows nothing, for library use and tests."""

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0, unit: str = "") -> Iterator[Bar]:
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


@contextmanager
def report_hub_retries(progress: Progress) -> Iterator[None]:
    """Pass huggingface_hub's warnings on to the user, once each: one line where requests fail and are tried again."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.handlers, logger.propagate = [_HubWarnings(progress)], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.level, logger.propagate, logger.handlers = before


class _HubWarnings(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self.progress, self.reported = progress, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        retries = ("thrown while requesting", "Retrying in", "Rate limited", "Error while downloading")
        if any(sign in text for sign in retries):
            reason = text.partition(" thrown while")[0].strip("'\"") or text
            text = f"a request to the hub failed ({reason[:120]}); trying again"
            key = "retry"
        else:
            text = key = f"the hub: {text[:300]}"
        if key not in self.reported:
            self.reported.add(key)
            self.progress.warn(text)
