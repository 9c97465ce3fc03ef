"""What is saved of a training: one adapter that plain PEFT puts on the untouched base."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorakit.model.adapters.svd import svd_to_lora
from lorakit.model.adapters.weight_init import INITIAL

PlainLora = tuple[Any, dict[str, torch.Tensor]]
"""PEFT's configuration of a LoRA or DoRA, and its tensors by their names in an adapter file."""


def save_adapter(model: Any, folder: Path) -> None:
    """Write a PEFT model's adapter as `adapter_config.json` and `adapter_model.safetensors`. LoRA, rsLoRA and DoRA as
    they are; every other kind as the plain LoRA that computes the same."""
    config, tensors = to_plain_lora(model)
    trained = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = trained.base_model_name_or_path, trained.revision
    config.inference_mode = True
    save_config(config, folder)
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_config(config: Any, folder: Path) -> None:
    """Write `adapter_config.json`, the same for the same adapter (PEFT writes sets in the order of hashes)."""
    ordered = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(ordered, name, sorted(value))
    ordered.save_pretrained(str(folder))


def full_config(model: Any) -> Any:
    """PEFT's configuration of the adapter that is trained, with all ends of tied modules that are trained whole. PEFT
    strikes all but the first from it, and on loading ties only those again whose names it knows."""
    config = copy.deepcopy(model.peft_config["default"])
    named = model.base_model.model.named_modules()
    config.modules_to_save = [name for name, part in named if isinstance(part, ModulesToSaveWrapper)] or None
    return config


def to_plain_lora(model: Any) -> PlainLora:
    """A LoRA or DoRA configuration and its tensors by name, as PEFT saves them."""
    if model.peft_config["default"].peft_type == "ADALORA":
        config, tensors = svd_to_lora(model)
        config.modules_to_save = full_config(model).modules_to_save
        return config, tensors
    config = full_config(model)
    config.init_lora_weights = True
    tensors = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    if INITIAL in model.peft_config:
        # s (B A - B0 A0) as one product of twice the rank: [B, -B0] [A; A0], at the same scale.
        initial = get_peft_model_state_dict(model, adapter_name=INITIAL, save_embedding_layers=False)
        for name, tensor in initial.items():
            tensors[name] = torch.cat([tensors[name], tensor], dim=0 if ".lora_A." in name else 1)
        config.r *= 2
        config.lora_alpha *= 2
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    return config, tensors


def is_no_op(folder: Path) -> bool:
    """Whether every change of an adapter's file is zero. One that holds other weights besides, or DoRA's magnitudes, is
    not judged."""
    zero: dict[str, bool] = {}  # of each module: of the parts of a change, one that is all zero makes it zero
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                module, _, part = name.partition(".lora_")
                if name.endswith(".ranknum"):
                    continue
                if part.split(".")[0] not in ("A", "B", "E", "embedding_A", "embedding_B") or "bias" in part.split("."):
                    return False
                zero[module] = zero.get(module, False) or not bool(file.get_tensor(name).any())
    except (OSError, SafetensorError):
        return False  # loading it will say what is wrong
    return bool(zero) and all(zero.values())
