"""How many parameters a run will train, before its weights are loaded."""

from lorakit.model.spec_from_meta import spec_from_meta
from lorakit.plan.model_info import read_model_info
from lorakit.plan.trainable_params import count_parameters
from lorakit.prepare import Prepared
from lorakit.recipe.adapter_kind import initial_adapter
from lorakit.recipe.schema import Spectrum


def planned_parameters(prepared: Prepared) -> tuple[int, int] | None:
    """Trainable and all parameters of a prepared recipe; None where the choice of modules needs the weights."""
    settings, folder = prepared.recipe.adapter, prepared.base.folder
    if isinstance(settings.layers, Spectrum) and not initial_adapter(settings):
        return None
    info = read_model_info(folder)
    return count_parameters((info and info.spec) or spec_from_meta(folder), settings)
