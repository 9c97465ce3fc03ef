"""A lorakit command in a forked process, which may be ended at a file operation by the shim."""

import ctypes
import importlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIM = "TORTURE_SHIM"


@dataclass(frozen=True)
class Trap:
    """What meets a command: at the `at`-th file operation below `root` its end (`error` 0), or an error of the system.

    `half`: a write gives half of its bytes first. `lasting`: all that takes room fails from there on. `at` 0: nothing,
    operations are counted."""

    root: Path
    at: int = 0
    error: int = 0
    half: bool = False
    lasting: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the number of the signal."""

    code: int
    text: str
    operations: tuple[str, ...] = ()


def compile_shim(folder: Path) -> Path:
    """The shim as a shared library."""
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-pthread"], check=True)
    return library


def run_command(
    arguments: Sequence[object],
    place: Path,
    cache: Path,
    trap: Trap | None = None,
    signals: Sequence[tuple[float, int]] = (),
    seconds: float = 120,
    beside: Path | None = None,
) -> Ended:
    """`lorakit ARGUMENTS` in a fork of this process, in the folder `place`. What it prints is kept in `beside`.

    `signals`: how many seconds after its start, and their numbers.

    Raises:
        TimeoutError: it did not end in time; it is killed.
    """
    out, log = ((beside or place) / name for name in ("output.txt", "operations.txt"))
    with out.open("wb") as output, log.open("wb") as operations:
        child = os.fork()
        if child == 0:
            _be_lorakit(list(map(str, arguments)), place, cache, trap, output.fileno(), operations.fileno())
    ended = _wait(child, signals, seconds)
    text = out.read_text(encoding="utf-8", errors="replace")
    lines = tuple(log.read_text(encoding="utf-8", errors="replace").splitlines())
    if ended is None:
        raise TimeoutError(f"lorakit {arguments[0]}: not over after {seconds:.0f} s\n{text}")
    return Ended(ended, text, lines)


def call_in_fork(function: Callable[[], None]) -> None:
    """Run a function in a fork, for what leaves this process unfit to fork again. Raises where it fails."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the preparation failed")


def import_all_of(commands: Sequence[tuple[Sequence[object], Path, Path]], names: Path) -> None:
    """Run commands in a fork and import here what they imported, so that later forks need not.

    They do not run here themselves: torch's threads of a backward pass would not survive a fork.
    """

    def noted() -> None:
        for arguments, place, cache in commands:
            child = os.fork()
            if child == 0:
                _be_lorakit(list(map(str, arguments)), place, cache, None, 2, None, names)
            if os.waitpid(child, 0)[1]:
                raise RuntimeError(f"lorakit {' '.join(map(str, arguments))} failed")

    noted()
    for name in names.read_text(encoding="utf-8").split():
        if name.partition(".")[0] != "__main__":
            try:
                importlib.import_module(name)
            except ImportError:  # a name that a library put into sys.modules by hand
                continue


def _be_lorakit(
    arguments: list[str],
    place: Path,
    cache: Path,
    trap: Trap | None,
    output: int,
    operations: int | None,
    names: Path | None = None,
) -> None:
    code: Any = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(place)
        os.environ["LORAKIT_CACHE"] = str(cache)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["lorakit", *arguments]
        from lorakit.cli import main

        if trap:
            shim = ctypes.CDLL(os.environ[SHIM])
            folder = os.fsencode(trap.root)
            at = ctypes.c_long(trap.at)
            shim.torture_arm(folder, at, trap.error, int(trap.half), int(trap.lasting), operations or -1)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            if names:
                with names.open("a", encoding="utf-8") as file:
                    file.write("\n".join(sys.modules) + "\n")
        finally:
            os._exit(code)


def _wait(child: int, signals: Sequence[tuple[float, int]], seconds: float) -> int | None:
    began, handle, pending = time.monotonic(), os.pidfd_open(child), sorted(signals)
    try:
        while True:
            passed = time.monotonic() - began
            until = min([seconds, *(when for when, _ in pending)])
            if select.select([handle], [], [], max(0.0, until - passed))[0]:
                break
            if pending and until == pending[0][0]:
                signal.pidfd_send_signal(handle, pending.pop(0)[1])
                continue
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(handle)
