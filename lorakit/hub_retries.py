"""What huggingface_hub says of requests that it tries again, told in a line instead of several warnings each."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.progress import Progress

_OF_A_RETRY = ("thrown while requesting", "Retrying in", "Rate limited", "Error while downloading")


@contextmanager
def report_hub_retries(progress: Progress) -> Iterator[None]:
    """Within this, the library's warnings go to the user: one line where requests fail and are tried again."""
    logger, listener = logging.getLogger("huggingface_hub"), _Listener(progress)
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.level, logger.propagate, logger.handlers = before


class _Listener(logging.Handler):
    """Passes each thing on once."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if any(sign in text for sign in _OF_A_RETRY):
            reason = text.partition(" thrown while")[0].strip("'\"") or text
            text = f"the hub did not give what was asked for ({reason[:120]}); trying again"
            key = "retry"
        else:
            text = key = f"the hub: {text[:300]}"
        if key not in self._told:
            self._told.add(key)
            self._progress.warn(text)
