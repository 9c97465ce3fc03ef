"""Every check of `lorakit doctor`, in order."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.doctor import bitsandbytes, gpu, machine, models, packages
from lorakit.doctor.check import Check, DoctorFinding, run_check

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe


def run_doctor(network: bool, recipe: "Recipe | None" = None) -> Iterator[tuple[str, DoctorFinding]]:
    """Each result with its section, as soon as it is there.

    Uses the network only with `network`. With a recipe, also checks its base model, its settings, and the disk space
    where its run goes.
    """
    for section, checks in _sections(network, recipe).items():
        for name, check in checks.items():
            for result in run_check(name, check):
                yield section, result


def _sections(network: bool, recipe: "Recipe | None") -> dict[str, dict[str, Check]]:
    """Section -> its checks, by the name to report one under that raises an error."""
    run = Path(recipe.output.dir) if recipe and recipe.output.dir else None
    base: dict[str, Check] = {"base": partial(models.check_base, recipe)} if recipe else {}
    return {
        "Python": {"Python": packages.check_python},
        "Packages": {"packages": packages.check_required, "extras": packages.check_optional},
        "GPU": {"GPU": gpu.check_gpus, "torch on GPU": gpu.check_torch},
        "bitsandbytes": {"bitsandbytes": bitsandbytes.check_bitsandbytes},
        "Processor and memory": {
            "threads": machine.check_threads,
            "speed": machine.check_speed,
            "memory": machine.check_memory,
        },
        "What auto chooses here": {"auto": partial(machine.check_choices, recipe)},
        "Disk": {"disk": partial(machine.check_disk, run)},
        "Hub": {"hub": partial(models.check_hub, network)},
        "Models": {"carried": models.check_bundled_models, "hub's cache": models.check_cached_models, **base},
    }
