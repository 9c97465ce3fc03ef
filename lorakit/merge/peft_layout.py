"""What PEFT makes of an adapter's configuration on a model: its layers, and its file's tensors. No weight is read."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file

from lorakit.atomic_io import files_in
from lorakit.errors import UserError
from lorakit.model.spec_from_meta import meta_model

_NAME = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterLayer:
    """One weight that an adapter changes by scale * B A."""

    path: str
    """Of the weight in the base model: `...q_proj.weight`, or a parameter that holds several experts."""
    stem: str
    """What the names of its tensors begin with: `.lora_A.weight` and `.lora_B.weight` follow."""
    scale: float
    experts: int
    """The matrices that a fused weight holds; 1 for a linear layer."""
    turned: bool
    """Whether each matrix of the weight is (in, out), the other way than B A is."""
    is_parameter: bool
    """Whether PEFT adapts it by `target_parameters`."""

    @property
    def target(self) -> str:
        """How PEFT's configuration names it: a layer by its path, a parameter by its own."""
        return self.path if self.is_parameter else self.path.removesuffix(".weight")


@dataclass(frozen=True)
class AdapterLayout:
    """The layers of an adapter, and every tensor of its file by name, with its shape."""

    layers: list[AdapterLayer]
    shapes: dict[str, tuple[int, ...]]


def adapter_layout(folder: Path, config: Any) -> AdapterLayout:
    """What the adapter of a PEFT configuration is on the model of a folder.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: PEFT cannot put it on this model.
    """
    own = copy.deepcopy(config)
    own.base_model_name_or_path = None  # which PEFT else compares with the folder's
    with torch.device("meta"):
        model = get_peft_model(meta_model(folder), own)
    return AdapterLayout(
        lora_layers(model), {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
    )


def lora_layers(model: Any) -> list[AdapterLayer]:
    """The layers of a PEFT model that have A and B."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _NAME in module.lora_A:
            path = ".".join(part for part in name.removeprefix(_PREFIX).split(".") if part != "base_layer")
            is_parameter = isinstance(module, ParamWrapper)
            weight = module.parameter_name if is_parameter else "weight"
            experts = module.num_experts if is_parameter else 1
            turned = experts > 1 and not module._did_swap_in_out_features if is_parameter else module.fan_in_fan_out
            found.append(
                AdapterLayer(
                    f"{path}.{weight}", name, float(module.scaling[_NAME]), experts, bool(turned), is_parameter
                )
            )
    return found


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT model's adapter, by the names under which PEFT saves them."""
    named: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return named


def plain_lora_config(layers: Mapping[AdapterLayer, int], whole: Sequence[str] = (), tied: bool = False) -> LoraConfig:
    """The configuration of a plain LoRA of these ranks with a scale of 1, since alpha equals the rank in each layer.

    Args:
        whole: modules that it brings whole.
        tied: whether these are embeddings that the model ties to its output head.
    """
    largest = max(layers.values())
    others = {layer.target: rank for layer, rank in layers.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(layer.target for layer in layers if not layer.is_parameter),
        target_parameters=sorted(layer.target for layer in layers if layer.is_parameter) or None,
        fan_in_fan_out=any(layer.turned and not layer.is_parameter for layer in layers),
        modules_to_save=list(whole) or None,
        ensure_weight_tying=tied,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def write_adapter(folder: Path, model: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter in PEFT's format, of which PEFT is asked first what it has to hold.

    Raises:
        UserError: PEFT cannot put the configuration on the model in the folder `model`, or means other tensors by it.
    """
    try:
        shapes = adapter_layout(model, config).shapes
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{model}: PEFT cannot put this adapter on it: {error}") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        name = min(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise UserError(
            f"{model}: PEFT cannot hold this adapter: of {name} it expects {shapes.get(name)}, it would be "
            f"{found.get(name)}."
        )
    config.save_pretrained(str(folder))
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write the document by which a folder is known, with the names of the folder's files."""
    facts = {**facts, "files": sorted({*files_in(path.parent), path.name, "README.md"})}
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
