"""How many parameters a run will train, before its weights are loaded."""

from pathlib import Path

from peft import PeftConfig

from lorakit.model.spec_from_meta import count_with_peft_config, count_with_recipe_adapter
from lorakit.prepare import Prepared
from lorakit.recipe.adapter_kind import adapter_folder, initial_adapter
from lorakit.recipe.schema import Spectrum


def planned_parameters(prepared: Prepared) -> tuple[int, int] | None:
    """Trainable and all parameters of a prepared recipe; None where the choice of modules needs the weights."""
    settings = prepared.recipe.adapter
    source = initial_adapter(settings)
    if source:
        return count_with_peft_config(
            prepared.base.folder, PeftConfig.from_pretrained(str(adapter_folder(Path(source))))
        )
    if isinstance(settings.layers, Spectrum):
        return None
    return count_with_recipe_adapter(prepared.base.folder, settings)
