"""Every check of `lorakit doctor`, in order."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.doctor import check, collective, machine, models
from lorakit.doctor.check import Check, DoctorFinding, run_check

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe


def run_doctor(network: bool, recipe: "Recipe | None" = None) -> Iterator[tuple[str, DoctorFinding]]:
    """Each result with its section, as soon as it is there. Uses the network only with `network`. With a recipe, also
    checks its base model, its settings, and the disk space where its run goes."""
    for section, checks in _sections(network, recipe).items():
        for one in checks:
            for result in run_check(section, one):
                yield section, result


def _sections(network: bool, recipe: "Recipe | None") -> dict[str, list[Check]]:
    run = Path(recipe.output.dir) if recipe and recipe.output.dir else None
    speed = partial(machine.measure_formats, "cpu", "float32", "bfloat16")
    return {
        "Python": [check.check_python],
        "Packages": [check.check_required, check.check_optional],
        "GPU": [machine.check_gpus, machine.check_torch],
        "bitsandbytes": [machine.check_bitsandbytes],
        "Processor and memory": [machine.check_threads, speed, machine.check_memory],
        "Several processes": [collective.check_links, collective.check_collective],
        "What auto chooses here": [partial(machine.check_choices, recipe)],
        "Disk": [partial(machine.check_disk, run)],
        "Hub": [partial(models.check_hub, network)],
        "Models": [models.check_bundled_models, *([partial(models.check_base, recipe)] if recipe else [])],
    }
