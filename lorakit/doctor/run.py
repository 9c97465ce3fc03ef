"""Every check of `lorakit doctor`, in order."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.doctor import base, choices, cpu, disk, gpu, hub, models, packages
from lorakit.doctor import bitsandbytes as quantization
from lorakit.doctor.finding import Check, CheckResult, findings_of

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe


def examine(network: bool, recipe: "Recipe | None" = None) -> Iterator[tuple[str, CheckResult]]:
    """Every finding with its section, as it is found; a check that fails takes no other down.

    The network is used only with `network`. With a recipe it is also asked what this recipe needs: its base model, its
    settings, room where its run goes.
    """
    for section, checks in _sections(network, recipe).items():
        for name, check in checks.items():
            for finding in findings_of(name, check):
                yield section, finding


def _sections(network: bool, recipe: "Recipe | None") -> dict[str, dict[str, Check]]:
    """Each section's checks, by the name under which a check is reported that ends with an error."""
    run = Path(recipe.output.dir) if recipe and recipe.output.dir else None
    asked: dict[str, Check] = {"base": partial(base.base, recipe)} if recipe else {}
    return {
        "Python": {"Python": packages.python, "system": packages.system},
        "Packages": {"packages": packages.required, "extras": packages.optional},
        "GPU": {"GPU": gpu.cards, "torch": gpu.torch_on_gpu},
        "bitsandbytes": {"layers": quantization.layers, "optimizer": quantization.optimizer},
        "Processor and memory": {
            "processor": cpu.cores,
            "threads": cpu.threads,
            "speed": cpu.speeds,
            "memory": cpu.memory,
        },
        "What auto chooses here": {"auto": partial(choices.choices, recipe)},
        "Disk": {"disk": partial(disk.rooms, run)},
        "Hub": {"hub": hub.settings, "reachable": hub.reachable if network else hub.not_asked},
        "Models": {"carried": models.carried, "hub's cache": models.cached, "known sizes": models.known, **asked},
    }
