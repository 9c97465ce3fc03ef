"""How many parameters a run will train, before its weights are loaded."""

from pathlib import Path

from peft import PeftConfig

from lorakit.model.counting import parameter_counts_of, parameter_counts_with
from lorakit.prepare import Prepared
from lorakit.recipe.kinds import adapter_folder, begins_from
from lorakit.recipe.schema import Spectrum


def planned_parameters(prepared: Prepared) -> tuple[int, int] | None:
    """Trainable and all parameters of a prepared recipe; None where the choice of modules needs the weights."""
    settings = prepared.recipe.adapter
    source = begins_from(settings)
    if source:
        return parameter_counts_with(
            prepared.base.folder, PeftConfig.from_pretrained(str(adapter_folder(Path(source))))
        )
    if isinstance(settings.layers, Spectrum):
        return None
    return parameter_counts_of(prepared.base.folder, settings)
