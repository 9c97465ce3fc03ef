"""Python, the system, and the packages that lorakit needs: their versions, and whether they can be imported."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import lorakit
from lorakit.doctor.check import IMPORTED, DoctorFinding, broken, import_error, installed, note, ok

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Older ones have known holes that a downloaded model or checkpoint can use.
_SECURITY_FLOORS = {"torch": "2.10", "transformers": "5.3"}
_NEED_TORCH = {"bitsandbytes", "transformers", "accelerate", "peft", "trl"}
_EXTRAS = {"gguf": "reads .gguf files", "tasks": "runs lm-eval's benchmarks (lorakit benchmark)"}


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
