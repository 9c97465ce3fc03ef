"""What a check of `lorakit doctor` reports, and how one that fails leaves the others running."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class DoctorFinding:
    """One thing that was checked."""

    name: str
    state: Literal["ok", "note", "broken"]
    """`note`: worth knowing, but no run fails of it; `broken`: something needed does not work."""
    message: str
    remedy: str = ""  # what to do, or the command that does it; empty where there is nothing to do
    figures: dict[str, Any] = field(default_factory=dict)
    """The same for programs, in bytes, FLOP/s, seconds and processors."""


Check = Callable[[], Iterable[DoctorFinding]]


def ok(name: str, message: str, **figures: Any) -> DoctorFinding:
    """Something that works, with its figures."""
    return DoctorFinding(name, "ok", message, figures=figures)


def note(name: str, message: str, remedy: str = "", **figures: Any) -> DoctorFinding:
    """Something worth knowing, of which no run fails."""
    return DoctorFinding(name, "note", message, remedy, figures)


def broken(name: str, message: str, remedy: str = "", **figures: Any) -> DoctorFinding:
    """Something needed that does not work."""
    return DoctorFinding(name, "broken", message, remedy, figures)


def run_check(name: str, check: Check) -> Iterator[DoctorFinding]:
    """The results of a check, one by one; an error that it raises is one too, unless LORAKIT_DEBUG is set."""
    results = iter(check())
    while True:
        try:
            with _quiet():
                result = next(results)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:
            if os.environ.get("LORAKIT_DEBUG"):
                raise
            yield broken(name, f"the check failed with {type(error).__name__}: {root_cause(error)}")
            return
        yield result


def root_cause(error: BaseException) -> str:
    """The first line of the error that began a chain: libraries wrap what really went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what libraries print to standard error and drop their warnings: standard output is for the results."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
