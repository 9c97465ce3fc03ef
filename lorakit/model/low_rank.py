"""Low-rank changes of the layers of a model: how PEFT lays them out in an adapter, read and written."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file

from lorakit.model.peft_adapter import save_config
from lorakit.model.spec_from_meta import meta_model

ADAPTER_NAME = "default"  # what PEFT calls an adapter that was given no name
PREFIX = "base_model.model."  # what PEFT puts before the names of the model's own modules


@dataclass(frozen=True)
class AdapterLayer:
    """One weight that an adapter changes by scale * B A."""

    path: str  # of the weight in the base model: `...q_proj.weight`, or a parameter that holds several experts
    stem: str = field(compare=False)  # what its tensors' names begin with: `.lora_A.weight`, `.lora_B.weight` follow
    scale: float = field(compare=False)
    experts: int  # the matrices that a fused weight holds; 1 for a linear layer
    transposed: bool  # whether each matrix of the weight is (in, out), the transpose of B A
    is_parameter: bool  # whether PEFT adapts it by `target_parameters`

    @property
    def target(self) -> str:
        """How PEFT's configuration names it: a layer by its path, a parameter by its own."""
        return self.path if self.is_parameter else self.path.removesuffix(".weight")


@dataclass(frozen=True)
class LowRankFactors:
    """A layer's change, scale * B A: A is (rank * experts, in), B is (out, rank * experts), both float32.

    `experts` is 1 for a linear layer. PEFT stacks the experts of a fused weight with A's rows ordered by expert first,
    and B's columns by rank first (ParamWrapper in peft/tuners/lora/layer.py).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    experts: int = 1

    @property
    def rank(self) -> int:
        return len(self.a) // self.experts

    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (experts, rank, in) and B as (experts, out, rank), without the scale."""
        b = self.b.reshape(len(self.b), -1, self.experts).permute(2, 0, 1)
        return self.a.reshape(self.experts, -1, self.a.shape[1]), b


def from_stacks(a: torch.Tensor, b: torch.Tensor) -> LowRankFactors:
    """Factors of scale 1 from A (experts, rank, in) and B (experts, out, rank)."""
    flat = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return LowRankFactors(a.reshape(-1, a.shape[-1]).contiguous(), flat.contiguous(), 1.0, len(a))


def adapter_layout(folder: Path, config: Any) -> tuple[list[AdapterLayer], list[str]]:
    """The layers that a PEFT configuration adapts on the model of a folder, and the names of its file's tensors."""
    with torch.device("meta"):
        model = get_peft_model(meta_model(folder), copy.deepcopy(config))
    return adapter_layers(model), list(adapter_tensors(model))


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
    """The path of a layer before PEFT wrapped it; fused experts are wrapped once for each of their parameters, and
    embeddings of which single rows are trained twice."""
    return ".".join(part for part in wrapped.split(".") if part not in ("base_layer", "token_adapter"))


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT model's adapter, by the names under which PEFT saves them."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def adapter_factors(model: Any) -> dict[AdapterLayer, LowRankFactors]:
    """What the adapter of a PEFT model does to each layer that has A and B, in float32."""
    tensors, factors = adapter_tensors(model), {}
    for layer in adapter_layers(model):
        a, b = (tensors[f"{layer.stem}.lora_{half}.weight"].float() for half in "AB")
        factors[layer] = LowRankFactors(a, b, layer.scale, layer.experts)
    return factors


def write_adapter(
    folder: Path,
    factors: Mapping[AdapterLayer, LowRankFactors],
    base_folder: Path,
    base: str | None,
    revision: str | None = None,
    whole: Sequence[str] = (),
    tied: bool = False,
    read_whole: Callable[[str], torch.Tensor] | None = None,
    module_names: Sequence[str] | None = None,
) -> int:
    """Write a plain LoRA of these factors in PEFT's format, with a scale of 1: alpha equals the rank in each layer.

    Modules named `whole` are held as `read_whole` gives their weights; `tied`: these are embeddings that the model ties
    to its output head. `module_names`: how the configuration names the linear layers, where not by their paths.
    Returns the number of parameters.
    """
    ranks = {layer: of_layer.rank for layer, of_layer in factors.items()}
    largest = max(ranks.values())
    linear = sorted(layer.target for layer in ranks if not layer.is_parameter)
    others = {layer.target: rank for layer, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(module_names or linear),
        target_parameters=sorted(layer.target for layer in ranks if layer.is_parameter) or None,
        fan_in_fan_out=any(layer.transposed and not layer.is_parameter for layer in ranks),
        modules_to_save=list(whole) or None,
        ensure_weight_tying=tied,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    layers, names = adapter_layout(base_folder, config)
    by_path = {layer.path: of_layer for layer, of_layer in factors.items()}
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        of_layer = by_path[layer.path]
        tensors |= {f"{layer.stem}.lora_A.weight": of_layer.a, f"{layer.stem}.lora_B.weight": of_layer.b}
    if read_whole is not None:
        tensors |= {name: read_whole(name.removeprefix(PREFIX)) for name in names if name not in tensors}
    config.base_model_name_or_path, config.revision = base, revision
    save_config(config, folder)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in plain.values())


def squared_norm(terms: Sequence[tuple[LowRankFactors, float]]) -> float:
    """|sum of weight * scale * B A|^2 (Frobenius), of changes and their weights, without computing any B A: the inner
    product of B A and B' A' is the sum of B^T B' times A A'^T, element by element."""
    wide = []
    for factors, weight in terms:
        a, b = factors.stacks()
        wide.append((weight * factors.scale, a.double(), b.double()))
    inner = (c * d * float(((b.mT @ q) * (a @ p.mT)).sum()) for c, a, b in wide for d, p, q in wide)
    return max(0.0, sum(inner))
