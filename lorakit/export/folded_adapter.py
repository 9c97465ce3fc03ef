"""An adapter as every server reads it right: plain LoRA of one rank whose scale is 1 in each layer.

Servers differ in what they read of PEFT's format: some take alpha / rank of the whole adapter for each layer, some drop
a type of layer that one layer lacks. So each layer's scale is folded into its B, smaller ranks are padded with zeros,
and layers that the adapter leaves alone get zeros.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from lorakit.errors import UserError
from lorakit.model.layerwise import adapter_without_base
from lorakit.model.low_rank import (
    ADAPTER_NAME,
    AdapterLayer,
    LowRankFactors,
    adapter_factors,
    adapter_tensors,
    base_path,
    write_adapter,
)

# A product B A whose factors lose more than this share of it in bfloat16 is written in other factors.
_LOSSY = 0.01

Factors = dict[AdapterLayer, LowRankFactors]


@dataclass(frozen=True)
class PlainLora:
    """An adapter that is LoRA on linear layers and nothing else. `lacking`: the layers of the types that it adapts
    which it leaves alone. `names`: what the last parts of the adapted layers' paths are, where these name no other
    module of the model; None where they do."""

    factors: Factors
    lacking: tuple[AdapterLayer, ...]
    shapes: dict[AdapterLayer, tuple[int, int]]
    names: tuple[str, ...] | None

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(of_layer.rank for of_layer in self.factors.values())

    @property
    def modules(self) -> tuple[str, ...]:
        """The types of the adapted layers: the last parts of their paths."""
        return tuple(sorted({last_name(layer) for layer in self.factors}))


@dataclass(frozen=True)
class FoldedAdapter:
    """What was written: its rank, the largest distance of a layer's change from the adapter's, as a share of that, and
    the largest share of a change that its factors lose in bfloat16."""

    rank: int
    layers: int
    added: int
    difference: float
    bfloat16_loss: float


def open_plain_lora(adapter: Path, base_folder: Path) -> tuple[PlainLora | None, str]:
    """The adapter of a folder, or None and what it is or has besides LoRA on linear layers, as a verb with its object.
    Of the base the configuration is read and no weight."""
    model, replaced = adapter_without_base(base_folder, adapter)
    obstacle = next(_obstacles(model, replaced), "")
    if obstacle:
        return None, obstacle
    tensors = adapter_tensors(model)
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken:
        raise UserError(f"{adapter}: holds numbers that are not finite, the first in {broken}. It is not exported.")
    factors = adapter_factors(model)
    lacking, shapes, names = _layers_of_same_types(model, factors)
    return PlainLora(factors, lacking, shapes, names), ""


def _obstacles(model: Any, replaced: list[str]) -> Iterator[str]:
    """What a server that reads A and B alone would lose or misread, as verbs with their objects."""
    config, head = model.peft_config[ADAPTER_NAME], model.get_output_embeddings()
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        yield f"is of PEFT's kind {kind}"
        return
    if config.use_dora:
        yield "is DoRA, which scales each row of the merged weight"
    if config.modules_to_save:
        yield f"holds modules that were trained whole ({', '.join(config.modules_to_save)})"
    if config.trainable_token_indices:
        yield "holds trained embeddings of single tokens"
    if config.bias != "none" or config.lora_bias:
        yield "holds trained biases"
    if config.alora_invocation_tokens:
        yield "is an aLoRA, which acts only after certain tokens"
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = base_path(path).removeprefix("base_model.model.")
        if variant := module.lora_variant.get(ADAPTER_NAME):
            yield f"changes {name} by a variant of LoRA ({type(variant).__name__})"
        if ADAPTER_NAME in module.lora_embedding_A:
            yield f"adapts the embeddings ({name})"
        if module is head:
            yield f"adapts the output head ({name})"
        if hasattr(module, "parameter_name"):
            yield f"adapts the fused weights of experts ({name}.{module.parameter_name})"
        elif module.get_base_layer().weight.ndim != 2:
            yield f"adapts a layer that is not linear ({name})"
    for tensor in (*adapter_tensors(model), *replaced):
        if not tensor.endswith((".lora_A.weight", ".lora_B.weight")):
            yield f"holds {tensor.removeprefix('base_model.model.')}"
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        yield "adapts no layer"


def last_name(layer: AdapterLayer) -> str:
    """The last part of the path of a layer: its type, such as q_proj."""
    return layer.target.rpartition(".")[2]


def _layers_of_same_types(
    model: Any, factors: Factors
) -> tuple[tuple[AdapterLayer, ...], dict[AdapterLayer, tuple[int, int]], tuple[str, ...] | None]:
    """The layers that an adapter leaves alone and whose paths differ from an adapted one's in numbers alone, the sizes
    (out, in) of all, and the names by which PEFT finds these layers and no other module."""
    types = {_without_numbers(layer.target): layer for layer in factors}
    adapted = {layer.target: layer for layer in factors}
    modules = {base_path(name): module for name, module in model.base_model.model.named_modules()}
    lacking, shapes = [], {}
    for path, module in modules.items():
        weight, like = getattr(module, "weight", None), types.get(_without_numbers(path))
        if like is None or weight is None or weight.ndim != 2:
            continue
        layer = adapted.get(path)
        if layer is None:
            layer = AdapterLayer(f"{path}.weight", "", 1.0, 1, like.transposed, False)
            lacking.append(layer)
        shapes[layer] = (weight.shape[1], weight.shape[0]) if layer.transposed else tuple(weight.shape)
    names = {last_name(layer) for layer in shapes}
    targets = {layer.target for layer in shapes}
    exact = all(path in targets for path in modules if path.rpartition(".")[2] in names)
    return tuple(lacking), shapes, tuple(sorted(names)) if exact else None


def _without_numbers(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def scale_into_b(factors: LowRankFactors) -> LowRankFactors:
    """The same change at a scale of 1. Where A and B are large and cancel each other, as those of pissa and olora,
    bfloat16 would lose much of B A: then its own singular directions are written, half of each value in A and in B."""
    plain = LowRankFactors(factors.a, factors.b * factors.scale)
    if bfloat16_loss(plain) <= _LOSSY:
        return plain
    (left, upper), (right, lower) = torch.linalg.qr(plain.b.double()), torch.linalg.qr(plain.a.double().mT)
    u, s, vh = torch.linalg.svd(upper @ lower.mT)
    half = s.sqrt()
    return LowRankFactors((half[:, None] * (vh @ right.mT)).float(), ((left @ u) * half).float())


def length_of(factors: LowRankFactors) -> float:
    """|scale * B A| (Frobenius), from triangular factors, so that it is exact where A and B cancel each other."""
    upper, lower = (torch.linalg.qr(half.double(), mode="r").R for half in (factors.b, factors.a.mT))
    return abs(factors.scale) * float(torch.linalg.matrix_norm(upper @ lower.mT))


def distance(one: LowRankFactors, other: LowRankFactors) -> float:
    """How far two changes of the same layer are apart, as a share of the first one's length."""
    b = torch.cat([one.b.double() * one.scale, -other.b.double() * other.scale], dim=1)
    off = length_of(LowRankFactors(torch.cat([one.a, other.a]), b))
    length = length_of(one)
    return off / length if length else (0.0 if off == 0 else float("inf"))


def bfloat16_loss(factors: LowRankFactors) -> float:
    """How far a change is from itself when A and B are rounded to bfloat16, as servers hold them."""
    rounded = LowRankFactors(factors.a.bfloat16().float(), factors.b.bfloat16().float(), factors.scale)
    return distance(factors, rounded)


def write_folded_adapter(
    lora: PlainLora, base_folder: Path, base: str | None, folder: Path, rank: int
) -> FoldedAdapter:
    """Write an adapter in PEFT's format, of one rank, which no layer's exceeds, at a scale of 1, and read it back."""
    folded = {}
    for layer, factors in lora.factors.items():
        folded[layer] = _padded(scale_into_b(factors), rank)
    for layer in lora.lacking:
        outer, inner = lora.shapes[layer]
        folded[layer] = LowRankFactors(torch.zeros(rank, inner), torch.zeros(outer, rank))
    write_adapter(folder, folded, base_folder, base, module_names=lora.names)
    written = adapter_factors(adapter_without_base(base_folder, folder)[0])
    differences, losses = [], []
    for layer, factors in written.items():
        original = lora.factors.get(layer)
        if original is None:
            differences.append(0.0 if length_of(factors) == 0 else float("inf"))
            continue
        differences.append(distance(original, factors))
        losses.append(bfloat16_loss(factors))
    complete = written.keys() == folded.keys()
    return FoldedAdapter(
        rank, len(written), len(lora.lacking), max(differences) if complete else float("inf"), max(losses)
    )


def _padded(factors: LowRankFactors, rank: int) -> LowRankFactors:
    more = rank - factors.rank
    pad = torch.nn.functional.pad
    return LowRankFactors(pad(factors.a, (0, 0, 0, more)), pad(factors.b, (0, more)))
