"""Several processes of one command on this machine, through torch's elastic launcher: started, told to stop, and their
ends understood.

torch's agent ends every process as soon as one has ended, which would cut a checkpoint short that another one is still
writing after Ctrl-C. So only its processes are used (torch.distributed.elastic.multiprocessing), and who ends whom is
decided here.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from lorakit.distributed.launchers import PARENT
from lorakit.distributed.watch import FAILURE, LOST, STOPPED
from lorakit.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER

_POLL = 0.05  # seconds
# Seconds until processes that go on after another one's failure, or after a second Ctrl-C, are killed. The watch of
# each ends it earlier, where that can.
_AFTER_FAILURE, _AT_ONCE = 20.0, 5.0
_OWN_CODES = (0, EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED)  # of a process that said what there is to say
_INTERRUPTED = {EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT}
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(count: int, arguments: Sequence[str], report: Callable[[str], None], remedy: Callable[[], str]) -> int:
    """Run this Python with `arguments` in `count` processes that find each other, and return the exit code of the one
    that failed first, or 0. `report` prints why a process ended that could not say so itself; `remedy` is its advice.

    Ctrl-C, SIGTERM and SIGHUP are passed on once, and processes then have all the time they need; a second one ends
    them at once. Ctrl-Z stops them and `fg` lets them go on. Only a program's main thread may call it."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    listener = socket.create_server(("127.0.0.1", 0))  # by itself the store would listen to every network
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), PARENT: str(os.getpid())}
    with _signals() as signals:
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # they are ours
        context: Any = start_processes(
            "lorakit",
            sys.executable,
            args={rank: tuple(arguments) for rank in range(count)},
            envs={rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # no files: what they print goes where ours does
        )
        signals.processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
        if signals.received:
            signals.send(signal.SIGTERM)
        try:
            ends = _wait(signals, store)
        finally:
            context.close(signal.SIGKILL)  # what is left of them, with the processes that they started
    return _conclude(ends, signals, store, report, remedy)


@dataclass
class _Signals:
    """What the parent was sent, and the processes that it passes it on to."""

    processes: dict[int, Any] = field(default_factory=dict)  # rank -> subprocess.Popen
    received: int = 0  # requests to stop
    at_once: float = 0.0  # when the second one came

    def stop(self, number: int, frame: FrameType | None) -> None:
        """The first request ends the step with a checkpoint, the next one ends the work."""
        if self.received and number == signal.SIGHUP:
            return  # it follows by itself: systemd sends it after SIGTERM, and a closed terminal more than one
        self.received += 1
        if self.received > 1:
            self.at_once = self.at_once or time.monotonic()
        # Before Python runs in them SIGTERM ends processes without a traceback.
        self.send(signal.SIGTERM if self.received == 1 else signal.SIGINT)

    def suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the processes have sessions of their own, and are not reached by the terminal."""
        self.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals, before = _Signals(), {}
    for number in (*_STOPS, signal.SIGTSTP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            before[number] = signal.signal(number, signals.suspend if number == signal.SIGTSTP else signals.stop)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(signals: _Signals, store: Any) -> dict[int, int]:
    """The exit codes by rank, in the order of the ends; negative: the signal that killed the process."""
    ends: dict[int, int] = {}
    failed_at = 0.0
    while len(ends) < len(signals.processes):
        time.sleep(_POLL)
        for rank, process in signals.processes.items():
            if rank not in ends and (code := process.poll()) is not None:
                ends[rank] = code
                if code:
                    failed_at = failed_at or time.monotonic()
        now = time.monotonic()
        if signals.at_once and now - signals.at_once > _AT_ONCE:
            return ends
        if failed_at and now - failed_at > _AFTER_FAILURE:
            if {*ends.values()} - {0, EXIT_INTERRUPTED} or not store.check([STOPPED]):
                return ends
            failed_at = 0.0  # they agreed to stop: whoever still works has all the time
    return ends


def _conclude(
    ends: dict[int, int], signals: _Signals, store: Any, report: Callable[[str], None], remedy: Callable[[], str]
) -> int:
    """The exit code of the command; what no process could say is said here."""
    announced = int(store.get(FAILURE).split()[1]) if store.check([FAILURE]) else 0
    if announced and announced != EXIT_INTERRUPTED:
        return announced
    if signals.received and (len(ends) < len(signals.processes) or _INTERRUPTED.intersection(ends.values())):
        if not store.check([STOPPED]):
            report("interrupted")
        return EXIT_INTERRUPTED
    first = next((code for code in ends.values() if code), 0)
    killed = next(((rank, code) for rank, code in ends.items() if code not in _OWN_CODES), None)
    if killed:
        report(f"rank {killed[0]} {_cause(killed[1])}. {remedy()}")
        return EXIT_FAILED
    if store.check([LOST]):
        report(store.get(LOST).decode().partition(" ")[2])
    return first


def _cause(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and said nothing"
    name = signal.Signals(-code).name if -code in {number.value for number in signal.Signals} else f"signal {-code}"
    hints = {"SIGKILL": " (main memory may have run out)", "SIGSEGV": " (a fault in a library)"}
    return f"was killed by {name}{hints.get(name, '')}"
