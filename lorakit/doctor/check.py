"""What a check of `lorakit doctor` reports, how one that fails leaves the others running, and the first checks: Python,
the system, and the packages that lorakit needs, their versions, and whether they can be imported.
"""

import functools
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import lorakit

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What a run takes from each package. Some import the rest of themselves only when a name is asked for.
IMPORTED = {"torch": "nn", "bitsandbytes": "nn", "transformers": "AutoModelForCausalLM", "accelerate": "Accelerator"}
IMPORTED |= {"peft": "LoraConfig", "datasets": "Dataset", "trl": "SFTTrainer"}


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


def _make(state: Literal["ok", "note", "broken"]) -> Callable[..., DoctorFinding]:
    def make(name: str, message: str, remedy: str = "", **figures: Any) -> DoctorFinding:
        return DoctorFinding(name, state, message, remedy, figures)

    return make


ok, note, broken = _make("ok"), _make("note"), _make("broken")


def run_check(name: str, check: Check) -> Iterator[DoctorFinding]:
    """The results of a check, one by one; an error that it raises is one too, unless LORAKIT_DEBUG is set. What
    libraries print goes to standard error and their warnings are dropped: standard output is for the results."""
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


# Older ones have known holes that a downloaded model or checkpoint can use.
_SECURITY_FLOORS = {"torch": "2.10", "transformers": "5.3"}
_NEED_TORCH = {"bitsandbytes", "transformers", "accelerate", "peft", "trl"}
_EXTRAS = {
    "gguf": "reads .gguf files",
    "export": "writes and runs .gguf files (lorakit export)",
    "tasks": "runs lm-eval's benchmarks (lorakit benchmark)",
    "deepspeed": "shares out a training over several devices (train.sharding zero-2 and zero-3)",
}


def check_python() -> Iterator[DoctorFinding]:
    """The interpreter, lorakit itself, and the operating system."""
    where = sys.prefix if sys.prefix == sys.base_prefix else f"{sys.prefix}, a virtual environment"
    yield ok("Python", f"{platform.python_version()} in {where}")
    yield ok("lorakit", lorakit.__version__)
    if platform.system() != "Linux":
        yield note("system", f"{platform.system()} on {platform.machine()}: lorakit is tested on Linux only")


def check_required() -> Iterator[DoctorFinding]:
    """Every package that lorakit's metadata asks for: its version, and for those that a run loads its import."""
    requirements = {item.name: item for item in _requirements("")}
    torch_broken, others = False, 0
    for name in {**IMPORTED, **requirements}:
        result, version = _check_version(name, requirements.get(name)), installed(name)
        if name in _NEED_TORCH and result.state == "ok" and torch_broken:
            result = note(name, f"{result.message}: not tried, since torch is broken")
        elif name in IMPORTED and version and (error := import_error(name)):
            remedy = result.remedy or f"pip install --force-reinstall {name}=={version.partition('+')[0]}"
            result = broken(name, f"{result.message}; cannot be imported: {error}", remedy)
        torch_broken = torch_broken or (name == "torch" and result.state == "broken")
        if name in IMPORTED or result.state != "ok":
            yield result
        else:
            others += 1
    if others:
        yield ok("others", f"{others} more packages, each in a version that lorakit is made for")


def check_optional() -> Iterator[DoctorFinding]:
    """The extras of lorakit."""
    for extra, purpose in _EXTRAS.items():
        requirements = [item for item in _requirements(extra) if item not in _requirements("")]
        if requirements and all(_check_version(item.name, item).state == "ok" for item in requirements):
            yield ok(f"extra {extra}", f"installed: {purpose}")
        else:
            yield note(f"extra {extra}", f"not installed: {purpose}", f"pip install 'lorakit[{extra}]'")


def _requirements(extra: str) -> list["Requirement"]:
    """What an installation with this extra, or with none, needs."""
    from packaging.requirements import Requirement

    items = map(Requirement, importlib.metadata.requires("lorakit") or ())
    return [item for item in items if item.marker is None or item.marker.evaluate({"extra": extra})]


def _check_version(name: str, requirement: "Requirement | None") -> DoctorFinding:
    """Whether the installed version is one that lorakit is made for."""
    from packaging.version import Version

    version, bounds = installed(name), str(requirement.specifier) if requirement else ""
    upgrade, floor = f"pip install --upgrade '{name}{bounds}'", _SECURITY_FLOORS.get(name, "0")
    if version is None:
        return broken(name, "not installed", upgrade)
    if Version(version) < Version(floor):
        return broken(name, f"{version}: below {floor} there are known security holes", upgrade)
    if requirement and not requirement.specifier.contains(version, prereleases=True):
        return broken(name, f"{version}: lorakit is made for {bounds}", upgrade)
    return ok(name, f"{version} ({bounds})" if bounds else version)
