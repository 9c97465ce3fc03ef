"""Ctrl-C: it stops what goes on, an answer or a line that is typed, and not the program."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class StopPressed(BaseException):
    """The user pressed Ctrl-C. SIGTERM and SIGHUP stay KeyboardInterrupt, which ends the program."""


@dataclass
class StopKey:
    """Ctrl-C while a block runs: it counts once, and presses that follow are ignored until the block has ended."""

    pressed: bool = False
    active: bool = True

    def press(self, number: int, frame: FrameType | None) -> None:
        if self.active and not self.pressed:
            self.pressed = True
            raise StopPressed

    def check(self) -> None:
        """Raise where the exception of a press was lost: Python drops those raised in a library's C callbacks."""
        if self.pressed:
            raise StopPressed


@contextmanager
def stop_key() -> Iterator[StopKey]:
    """Within this, Ctrl-C raises StopPressed. Only for the main thread, which Python's signals need."""
    key = StopKey()
    before = signal.signal(signal.SIGINT, key.press)
    try:
        try:
            yield key
        finally:
            key.active = False
    finally:
        signal.signal(signal.SIGINT, before)
