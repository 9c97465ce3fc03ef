"""What PEFT makes of an adapter's configuration on a model: its layers, and its file's tensors. No weight is read."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file

from lorakit.merge.low_rank import LowRankFactors
from lorakit.model.spec_from_meta import meta_model

ADAPTER_NAME = "default"
"""What PEFT calls an adapter that was given no name."""
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's own modules."""


@dataclass(frozen=True)
class AdapterLayer:
    """One weight that an adapter changes by scale * B A."""

    path: str
    """Of the weight in the base model: `...q_proj.weight`, or a parameter that holds several experts."""
    stem: str
    """What the names of its tensors begin with: `.lora_A.weight` and `.lora_B.weight` follow."""
    scale: float = field(compare=False)
    experts: int
    """The matrices that a fused weight holds; 1 for a linear layer."""
    transposed: bool
    """Whether each matrix of the weight is (in, out), the transpose of B A."""
    is_parameter: bool
    """Whether PEFT adapts it by `target_parameters`."""

    @property
    def target(self) -> str:
        """How PEFT's configuration names it: a layer by its path, a parameter by its own."""
        return self.path if self.is_parameter else self.path.removesuffix(".weight")


def adapter_layout(folder: Path, config: Any) -> tuple[list[AdapterLayer], dict[str, tuple[int, ...]]]:
    """The layers that a PEFT configuration adapts on the model of a folder, and the shapes of its file's tensors."""
    unbound = copy.deepcopy(config)
    unbound.base_model_name_or_path = None  # which PEFT otherwise compares with the folder's
    with torch.device("meta"):
        model = get_peft_model(meta_model(folder), unbound)
    return adapter_layers(model), {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}


def adapter_layers(model: Any) -> list[AdapterLayer]:
    """The layers of a PEFT model that have A and B."""
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or ADAPTER_NAME not in module.lora_A:
            continue
        is_parameter = isinstance(module, ParamWrapper)
        weight = module.parameter_name if is_parameter else "weight"
        experts = module.num_experts if is_parameter else 1
        transposed = experts > 1 and not module._did_swap_in_out_features if is_parameter else module.fan_in_fan_out
        path = f"{base_path(name.removeprefix(PREFIX))}.{weight}"
        layers.append(
            AdapterLayer(path, name, float(module.scaling[ADAPTER_NAME]), experts, bool(transposed), is_parameter)
        )
    return layers


def base_path(wrapped: str) -> str:
    """The path of a layer before PEFT wrapped it; fused experts are wrapped once for each of their parameters."""
    return ".".join(part for part in wrapped.split(".") if part != "base_layer")


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT model's adapter, by the names under which PEFT saves them."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def name_factors(factors: Mapping[AdapterLayer, LowRankFactors]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by PEFT's names."""
    halves = {f"{layer.stem}.lora_A.weight": of_layer.a for layer, of_layer in factors.items()}
    return halves | {f"{layer.stem}.lora_B.weight": of_layer.b for layer, of_layer in factors.items()}


def plain_lora_config(
    factors: Mapping[AdapterLayer, LowRankFactors], whole: Sequence[str] = (), tied: bool = False
) -> LoraConfig:
    """The configuration of a plain LoRA of these factors with a scale of 1: alpha equals the rank in each layer. It
    holds the modules `whole`; `tied`: these are embeddings that the model ties to its output head."""
    ranks = {layer: of_layer.rank for layer, of_layer in factors.items()}
    largest = max(ranks.values())
    others = {layer.target: rank for layer, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(layer.target for layer in ranks if not layer.is_parameter),
        target_parameters=sorted(layer.target for layer in ranks if layer.is_parameter) or None,
        fan_in_fan_out=any(layer.transposed and not layer.is_parameter for layer in ranks),
        modules_to_save=list(whole) or None,
        ensure_weight_tying=tied,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def write_adapter(folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter in PEFT's format."""
    config.save_pretrained(str(folder))
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
