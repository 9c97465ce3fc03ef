"""Attaching: a frozen model and a recipe's adapter section -> a PEFT model; and loading a trained adapter back."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from lorakit.errors import UserError
from lorakit.model.targets import select_targets
from lorakit.recipe.schema import Adapter
from lorakit.tables import ADAPTERS


def attach_adapter(model: Any, settings: Adapter, seed: int) -> Any:
    """The model with a fresh adapter, initialized from `seed`; its weights are float32 whatever the base is in."""
    torch.manual_seed(seed)
    config = ADAPTERS[settings.kind].function(settings, select_targets(model, settings))
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"adapter.targets: PEFT cannot adapt these modules: {str(error).splitlines()[0]} Leave them out with "
            "adapter.exclude."
        ) from error


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the trained adapter of a folder, in evaluation mode.

    Raises:
        UserError: the folder holds no adapter, or one that does not belong to this model.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}, so it holds no adapter.")
    try:
        loaded = PeftModel.from_pretrained(model, folder).eval()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            missing = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys() - set(file.keys())
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: this adapter cannot be put on the base model: {reason}") from error
    if missing:
        raise UserError(
            f"{folder}: this adapter lacks {len(missing)} tensors, the first is {min(missing)}. It is damaged."
        )
    return loaded


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trainable and all parameters, as PEFT counts them."""
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)
