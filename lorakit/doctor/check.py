"""What a check of `lorakit doctor` reports, and how one that fails leaves the others running."""

import functools
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Literal

# What a run takes from each package. Some import the rest of themselves only when a name is asked for.
IMPORTED = {
    "torch": "nn",
    "bitsandbytes": "nn",
    "transformers": "AutoModelForCausalLM",
    "accelerate": "Accelerator",
    "peft": "LoraConfig",
    "datasets": "Dataset",
    "trl": "SFTTrainer",
}


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


class UntriedCheck(Exception):
    """A package that the check needs cannot be imported, which is a finding of its own."""


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
    """The results of a check, one by one; an error that it raises is one too, unless LORAKIT_DEBUG is set.

    What libraries print goes to standard error and their warnings are dropped: standard output is for the results.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    results = iter(check())
    while True:
        try:
            with redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
                result = next(results)
        except StopIteration:
            return
        except UntriedCheck as error:
            yield note(name, str(error))
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


@functools.cache
def import_error(package: str) -> str | None:
    """Why a package cannot be imported; None where it can. It is tried once: a second time torch fails otherwise."""
    try:
        getattr(importlib.import_module(package), IMPORTED[package])
    except (Exception, SystemExit) as error:  # whatever a broken installation raises
        return root_cause(error)
    return None


def require_import(*packages: str) -> None:
    """Leave a check untried where one of these packages cannot be imported."""
    if missing := next(filter(import_error, packages), None):
        raise UntriedCheck(f"not tried, since {missing} cannot be imported")


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
