"""Parameter counts from a model's config alone: no weight is read, and none is allocated."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.model.attach import chooses_everything, parameter_counts
from lorakit.model.targets import Targets, select_targets
from lorakit.recipe.kinds import kind_of
from lorakit.recipe.schema import Adapter


def parameter_counts_of(config: Path | dict[str, Any], settings: Adapter) -> tuple[int, int]:
    """Trainable and all parameters of the model of a config with a recipe's adapter, as PEFT counts them.

    Args:
        config: a model's folder, or what is in its config.json.

    Raises:
        UserError: the config is of no causal language model, or the adapter section chooses what it does not have.
    """
    model = empty_model(config)
    kind = kind_of(settings)
    targets = select_targets(model, settings, bool(kind.facts.get("experts")))
    with torch.device("meta"):
        adapter = kind.function(settings, targets)
        if adapter is not None:
            return parameter_counts(get_peft_model(model, adapter))
    total = sum(parameter.numel() for parameter in model.parameters())
    return (total if chooses_everything(settings) else _chosen(model, targets)), total


def parameter_counts_with(folder: Path, config: Any) -> tuple[int, int]:
    """Trainable and all parameters of a model folder's model with the adapter of a PEFT configuration."""
    model = empty_model(folder)
    config.init_lora_weights, config.inference_mode = False, False
    try:
        with torch.device("meta"):
            return parameter_counts(get_peft_model(model, config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"adapter.from: this adapter cannot be put on the base model: {error}") from error


def empty_model(config: Path | dict[str, Any]) -> Any:
    """The model of a config without weights, on torch's meta device.

    Raises:
        UserError: the config is of no causal language model.
    """
    try:
        if isinstance(config, dict):
            read = AutoConfig.for_model(**config)
        else:
            read = AutoConfig.from_pretrained(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.base: no model can be made of this config: {str(error).splitlines()[0]}") from error


def _chosen(model: Any, targets: Targets) -> int:
    """The size of the weights that are trained themselves."""
    named = [*(f"{path}.weight" for path in targets.modules), *targets.experts]
    return sum(model.get_parameter(name).numel() for name in named)
