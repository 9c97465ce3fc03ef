"""What a check found, and how checks are kept from taking each other down."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at."""

    name: str
    state: State
    """`note`: worth knowing, and nothing that a run fails of; `broken`: something needed does not work."""
    message: str
    remedy: str = ""
    """What to do, or the command that does it; empty where there is nothing to do."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The same for programs, in bytes, FLOP/s, seconds and processors."""


Check = Callable[[], Iterable[CheckResult]]


def findings_of(name: str, check: Check) -> Iterator[CheckResult]:
    """The findings of a check, one by one; an error that it raises is a finding too.

    With LORAKIT_DEBUG set the error is raised, so that its place is seen.
    """
    findings = iter(check())
    while True:
        try:
            with _quiet():
                finding = next(findings)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:
            if os.environ.get("LORAKIT_DEBUG"):
                raise
            yield CheckResult(name, "broken", f"the check ended with {type(error).__name__}: {reason(error)}")
            return
        yield finding


def reason(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain: libraries wrap what really went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:,.1f} GiB"


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries print goes to standard error, their warnings nowhere: standard output is for the findings."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
