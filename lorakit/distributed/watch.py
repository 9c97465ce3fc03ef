"""Nobody waits for ever: each process shows the others that it lives, and ends where one of them does not.

A process inside a collective operation cannot look around: it waits in the library for a message that may never come.
Two threads look for it. One talks to the others through the store, on a connection of its own; where the link is cut
it may wait without end. The other counts. Both count their own ticks instead of reading a clock, so that a job that
was suspended (Ctrl-Z, a laptop that sleeps) goes on where it was: its ticks stopped as well.
"""

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from lorakit.errors import EXIT_FAILED

_TICK = 2.0  # seconds
_SILENT = 30  # ticks after which a process, or the store, counts as lost
_GRACE = 5  # ticks that this process has to end by itself after another one's failure
_LEFT = b"left"
# Keys of the store; the parent of `launch` reads the last three.
_BEAT, _HOST = "lorakit/beat", "lorakit/host"
FAILURE, LOST, STOPPED = "lorakit/failure", "lorakit/lost", "lorakit/stopped"

GO_ON = "Of a training every checkpoint that was written is complete; --resume goes on from the last one."


class Watch:
    """Watches the processes of one training from one of them, and ends this one where another is lost. `store`: a
    client of the store that nobody else uses. `report`: prints the message of a loss. `speaks`: whether this process
    is the one that prints where the processes cannot agree on one. `has_parent`: whether a parent tells of losses."""

    def __init__(
        self, store: Any, rank: int, size: int, speaks: bool, has_parent: bool, report: Callable[[str], None]
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.speaks, self.has_parent, self.report = speaks, has_parent, report
        self.own: Any = store.clone()  # for what the main thread asks meanwhile
        self.failed = False  # whether this process has announced a failure
        self._leaving = threading.Event()
        self._beats: list[bytes] = []
        self._answers, self._code = 0, 0
        store.set(f"{_HOST}/{rank}", socket.gethostname())
        store.set(f"{_BEAT}/{rank}", b"0")

    def start(self) -> None:
        """Begin, once every process has set its first beat."""
        for work in (self._converse, self._count):
            threading.Thread(target=work, name=f"lorakit-{work.__name__.strip('_')}", daemon=True).start()

    def leave(self) -> None:
        """This process ends as it should: the others miss it no longer."""
        self._leaving.set()
        try:
            self.own.set(f"{_BEAT}/{self.rank}", _LEFT)
        except RuntimeError:
            return  # the process that holds the store has left before, or is lost: nobody is there to be told

    def announce(self, code: int) -> bool:
        """Tell all that this process failed and ends with this exit code; they end with it too, a few seconds later
        where they do not by themselves. Whether it was the first to say so."""
        self.failed = True
        try:
            first: bytes = self.own.compare_set(FAILURE, "", f"{self.rank} {code}")
        except RuntimeError:
            return True  # without the store the others are told by the end of this process
        return first.decode().split()[0] == str(self.rank)

    def note_stop(self) -> None:
        """Tell the parent that this process says that the work was interrupted."""
        try:
            self.own.set(STOPPED, b"1")
        except RuntimeError:
            return  # the parent has gone

    def announced_code(self) -> int | None:
        """The exit code of the failure that a process has announced."""
        try:
            return int(self.own.get(FAILURE).split()[1]) if self.own.check([FAILURE]) else None
        except RuntimeError:
            return None

    def claims_loss(self, message: str) -> bool:
        """Whether this process is the one that tells the user of a lost one; none is where a parent does it."""
        try:
            first: bytes = self.own.compare_set(LOST, "", f"{self.rank} {message}")
        except RuntimeError:
            return self.speaks
        return first.decode().split()[0] == str(self.rank) and not self.has_parent

    def _converse(self) -> None:
        beat = 0
        while not self._leaving.wait(_TICK):
            beat += 1
            try:
                self.store.set(f"{_BEAT}/{self.rank}", str(beat))
                beats = self.store.multi_get([f"{_BEAT}/{rank}" for rank in range(self.size)])
                failed = self.store.check([FAILURE])
                code = int(self.store.get(FAILURE).split()[1]) if failed else 0
            except RuntimeError:
                continue  # `_count` sees that there was no answer
            self._beats, self._code = beats, code
            self._answers += 1

    def _count(self) -> None:
        answers, unanswered, grace = 0, 0, 0
        seen, silent = [b""] * self.size, [0] * self.size
        while not self._leaving.wait(_TICK):
            unanswered = 0 if self._answers > answers else unanswered + 1
            if unanswered:
                if unanswered >= _SILENT:
                    self._end(
                        "the process through which the others find each other has not answered for "
                        f"{_SILENT * _TICK:.0f} s: it ended, or its machine or the link to it is gone. {GO_ON}",
                        self.speaks,
                    )
                continue
            answers = self._answers
            grace = grace + 1 if self._code and not self.failed else 0
            if grace > _GRACE:
                os._exit(self._code)
            for rank, beat in enumerate(self._beats):
                silent[rank] = 0 if beat != seen[rank] or beat == _LEFT else silent[rank] + 1
                seen[rank] = beat
            lost = [rank for rank, ticks in enumerate(silent) if ticks >= _SILENT and rank != self.rank]
            if lost and not self._code:
                self._lose(lost[0])

    def _lose(self, rank: int) -> None:
        host = self.store.get(f"{_HOST}/{rank}").decode()
        message = (
            f"rank {rank} on {host} has been silent for {_SILENT * _TICK:.0f} s: its process hangs or was stopped, or "
            f"its machine or the link to it is gone. {GO_ON}"
        )
        self._end(message, self.claims_loss(message))

    def _end(self, message: str, speaks: bool) -> None:
        """End at once: the main thread may be inside an operation that nothing interrupts."""
        if self._leaving.is_set():
            return
        if speaks:
            self.report(message)
        os._exit(EXIT_FAILED)
