"""Python, the system, and the packages that lorakit needs: their versions, and whether they can be imported."""

import functools
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorakit.doctor.check import DoctorFinding, broken, note, ok, root_cause

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Older ones have known holes that a downloaded model or checkpoint can use.
_SECURITY_FLOORS = {"torch": "2.10", "transformers": "5.3"}
# What a run takes from each. Some packages import the rest of themselves only when a name is asked for.
_IMPORTED = {
    "torch": "nn",
    "bitsandbytes": "nn",
    "transformers": "AutoModelForCausalLM",
    "accelerate": "Accelerator",
    "peft": "LoraConfig",
    "datasets": "Dataset",
    "trl": "SFTTrainer",
}
_NEED_TORCH = {"bitsandbytes", "transformers", "accelerate", "peft", "trl"}
_EXTRAS = {"gguf": "reads .gguf files", "tasks": "runs lm-eval's benchmarks (lorakit benchmark)"}


def check_python() -> Iterator[DoctorFinding]:
    """The interpreter, lorakit itself, and the operating system: lorakit is tested on Linux."""
    import lorakit

    where = sys.prefix if sys.prefix == sys.base_prefix else f"{sys.prefix}, a virtual environment"
    yield ok("Python", f"{platform.python_version()} in {where}")
    yield ok("lorakit", lorakit.__version__)
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if platform.system() == "Linux":
        yield ok("system", system)
    else:
        yield note("system", f"{system}: lorakit is tested on Linux only")


def check_required() -> Iterator[DoctorFinding]:
    """Every package that lorakit's metadata asks for: its version, and for those that a run loads its import."""
    requirements = {item.name: item for item in _requirements() if _applies(item, "")}
    torch_broken = False
    for name in _IMPORTED:
        result = _check_version(name, requirements.pop(name, None))
        if name in _NEED_TORCH and result.state == "ok" and torch_broken:
            result = note(name, f"{result.message}: not tried, since torch is broken")
        elif (version := installed(name)) and (error := import_error(name)):
            remedy = result.remedy or f"pip install --force-reinstall {name}=={version.partition('+')[0]}"
            result = broken(name, f"{result.message}; cannot be imported: {error}", remedy)
        torch_broken = torch_broken or (name == "torch" and result.state == "broken")
        yield result
    others = [_check_version(name, requirement) for name, requirement in requirements.items()]
    faults = [result for result in others if result.state != "ok"]
    yield from faults
    if len(faults) < len(others):
        message = f"{len(others) - len(faults)} more packages, each in a version that lorakit is made for"
        yield ok("others", message)


def check_optional() -> Iterator[DoctorFinding]:
    """The extras of lorakit, and flash-attn."""
    for extra, purpose in _EXTRAS.items():
        requirements = [item for item in _requirements() if _applies(item, extra) and not _applies(item, "")]
        if requirements and all(_check_version(item.name, item).state == "ok" for item in requirements):
            yield ok(f"extra {extra}", f"installed: {purpose}")
        else:
            yield note(f"extra {extra}", f"not installed: {purpose}", f"pip install 'lorakit[{extra}]'")
    version = installed("flash-attn")
    if version:
        yield ok("flash-attn", f"{version}: model.attention can be flash_attention_2")
    else:
        message = "not installed: model.attention: flash_attention_2 needs it, on an NVIDIA GPU"
        yield note("flash-attn", message, "pip install flash-attn --no-build-isolation")


@functools.cache
def import_error(package: str) -> str | None:
    """Why a package cannot be imported; None where it can. It is tried once: a second time torch fails otherwise."""
    try:
        getattr(importlib.import_module(package), _IMPORTED[package])
    except (Exception, SystemExit) as error:  # whatever a broken installation raises
        return root_cause(error)
    return None


def missing_import(*packages: str) -> str | None:
    """The first of these packages that cannot be imported."""
    return next((package for package in packages if import_error(package)), None)


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list["Requirement"]:
    from packaging.requirements import Requirement

    return [Requirement(line) for line in importlib.metadata.requires("lorakit") or ()]


def _applies(item: "Requirement", extra: str) -> bool:
    """Whether an installation with this extra, or with none, needs the package."""
    return item.marker is None or item.marker.evaluate({"extra": extra})


def _check_version(name: str, requirement: "Requirement | None") -> DoctorFinding:
    """Whether the installed version is one that lorakit is made for."""
    from packaging.version import Version

    version, bounds = installed(name), str(requirement.specifier) if requirement else ""
    upgrade = f"pip install --upgrade '{name}{bounds}'"
    if version is None:
        return broken(name, "not installed", upgrade)
    floor = _SECURITY_FLOORS.get(name)
    if floor and Version(version) < Version(floor):
        return broken(name, f"{version}: below {floor} there are known security holes", upgrade)
    if requirement and not requirement.specifier.contains(version, prereleases=True):
        return broken(name, f"{version}: lorakit is made for {bounds}", upgrade)
    return ok(name, f"{version} ({bounds})" if bounds else version)
