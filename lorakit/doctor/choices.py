"""What `auto` chooses on this machine: for a recipe, or whatever the model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorakit.doctor.check import DoctorFinding, broken, note, ok
from lorakit.doctor.machine import matmul_speed
from lorakit.doctor.packages import import_error
from lorakit.errors import UserError
from lorakit.hardware.machine import Machine, this_machine, usable_machine
from lorakit.progress import Silent

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe

# The other choices depend on the model and the rows.
_BY_MACHINE = ("model.dtype", "model.attention", "data.packing", "train.optimizer")
# A product is not all of training: a smaller difference in it decides nothing.
_CLEARLY_FASTER = 1.3


def check_choices(recipe: "Recipe | None") -> Iterator[DoctorFinding]:
    """Each choice with its reason; of the number format also whether the measured speed agrees.

    Without a recipe, those that depend on the machine alone. A setting of the recipe that cannot work here is broken.
    """
    from lorakit.plan.auto import resolve_auto  # imported here, since a broken pydantic must not end the other checks
    from lorakit.plan.model_info import find_model_info
    from lorakit.recipe.schema import Data, Model, Recipe

    machine = _machine_of_runs()
    yield ok("device", f"{machine.name} ({machine.device})")
    checked = recipe or Recipe(model=Model(base="any/model"), data=Data(train="any/rows"))
    try:
        info = find_model_info(checked.model.base, checked.model.revision) if recipe else None
        choices = resolve_auto(checked, machine, info).choices
    except UserError as error:
        yield broken("settings", str(error))
        return
    for choice in choices:
        if recipe or choice.path in _BY_MACHINE:
            message = str(choice).removeprefix(f"{choice.path}: auto is ")
            faster = _faster_format(str(choice.value)) if choice.path == "model.dtype" and not machine.is_gpu else ""
            if faster:
                remedy = "compare a few steps of both: --set train.steps=5"
                yield note(choice.path, message + faster, remedy, value=choice.value)
            else:
                yield ok(choice.path, message, value=choice.value)


def _machine_of_runs() -> Machine:
    """The device that a run would use; the driver's answer where torch cannot be imported."""
    return this_machine() if import_error("torch") else usable_machine(Silent())


def _faster_format(chosen: str) -> str:
    """A clause on the other number format where it was measured as clearly faster on the processor."""
    other = {"float32": "bfloat16", "bfloat16": "float32"}.get(chosen)
    if other is None or import_error("torch"):
        return ""
    times = matmul_speed("cpu", other)[0] / matmul_speed("cpu", chosen)[0]
    return f"; but {other} was measured {times:.1f} times as fast" if times > _CLEARLY_FASTER else ""
