"""An adapter's change, added to the weights of its base. Everything in float32."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from lorakit.errors import UserError
from lorakit.model.low_rank import ADAPTER_NAME, PREFIX, LowRankFactors, base_path

_OF_ADAPTER = re.compile(rf"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{ADAPTER_NAME}(\.|$)")


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """What an adapter does to one weight: `apply` makes the merged one of the float32 weight, which may be changed in
    place, or, where it works `by_rows`, of its rows from a number on. `replaces`: the rows that it replaces (None: all
    of them), and by what."""

    apply: Callable[[torch.Tensor, int], torch.Tensor]
    by_rows: bool = True
    replaces: tuple[tuple[int, ...] | None, torch.Tensor] | None = None

    def is_same(self, other: "WeightDelta | None") -> bool:
        """Whether two deltas are known to make the same of the same weight."""
        if other is None or self.replaces is None or other.replaces is None:
            return self is other
        return self.replaces[0] == other.replaces[0] and torch.equal(self.replaces[1], other.replaces[1])


Deltas = dict[str, WeightDelta]  # by the path of the weight in the base model


def adapter_deltas(model: Any) -> Deltas:
    """What the adapter of a PEFT model does to each weight. The base's own weights need not be there."""
    for name, value in model.named_parameters():
        if _OF_ADAPTER.search(name) and not bool(value.isfinite().all()):
            raise UserError(
                f"adapter: {name.removeprefix(PREFIX)} holds numbers that are not finite. Merging would spoil the "
                "model: train again, or merge an earlier checkpoint."
            )
    deltas: Deltas = {}
    base = model.base_model.model
    for name, value in base.named_parameters():
        # The placeholder of a weight that only the base has brings strides of 0.
        if ".original_module." in name:  # which a module that was trained whole replaces
            continue
        if not _OF_ADAPTER.search(f".{name}") and any(value.stride()):  # a bias, or an embedding that was resized
            deltas[base_path(name)] = _replacement(_float32(value))
    for wrapped, module in base.named_modules():
        path = base_path(wrapped)
        if isinstance(module, ParamWrapper):
            _add(deltas, f"{path}.{module.parameter_name}", _experts(module))
        elif isinstance(module, LoraLayer):
            for name, delta in _layer_deltas(path, module).items():
                _add(deltas, f"{path}.{name}", delta)
        elif isinstance(module, ModulesToSaveWrapper):
            for name, value in module.modules_to_save[ADAPTER_NAME].named_parameters():
                deltas[f"{path}.{name}"] = _replacement(_float32(value))
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            rows = tuple(int(number) for number in tokens.token_indices[ADAPTER_NAME])
            trained = _float32(tokens.trainable_tokens_delta[ADAPTER_NAME])
            _add(deltas, f"{path}.weight", _replacement(trained, rows))
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            kind = model.peft_config[ADAPTER_NAME].peft_type
            raise UserError(
                f"adapter: {path} is adapted by PEFT's kind {getattr(kind, 'value', kind)}, which lorakit does not add "
                "to weights. Merge it with PEFT's own merge_and_unload."
            )
    return deltas


def _add(deltas: Deltas, path: str, delta: WeightDelta) -> None:
    """Apply a delta after the one that its weight has, if any."""
    first = deltas.get(path)
    if first is None:
        deltas[path] = delta
        return
    if first.replaces and first.replaces[0] is None and delta.replaces and delta.replaces[0] is not None:
        whole = first.replaces[1].clone()
        whole[list(delta.replaces[0])] = delta.replaces[1]
        deltas[path] = _replacement(whole)
        return

    def apply(weight: torch.Tensor, row: int) -> torch.Tensor:
        changed = first.apply(weight, row)
        return delta.apply(changed if changed is weight else changed.clone(), row)

    deltas[path] = WeightDelta(apply, first.by_rows and delta.by_rows)


def _layer_deltas(path: str, module: LoraLayer) -> Deltas:
    """Of a layer's weight and bias, by their names in it."""
    is_embedding = ADAPTER_NAME in module.lora_embedding_A
    if not is_embedding and ADAPTER_NAME not in module.lora_A:
        return {}
    variant, magnitude = module.lora_variant.get(ADAPTER_NAME), None
    if ADAPTER_NAME in module.lora_magnitude_vector:
        magnitude = _float32(module.lora_magnitude_vector[ADAPTER_NAME].weight)
    base = module.get_base_layer()
    if (variant is not None and magnitude is None) or (is_embedding and variant) or base.weight.ndim != 2:
        kind = type(base).__name__ if variant is None else getattr(variant, "__name__", type(variant).__name__)
        raise UserError(f"adapter: {path} is adapted in a way ({kind}) that lorakit cannot add to a weight.")
    scale = module.scaling[ADAPTER_NAME]
    if is_embedding:  # whose weight is (tokens, width), the transpose of B A, as that of Conv1D
        a, b = module.lora_embedding_A[ADAPTER_NAME], module.lora_embedding_B[ADAPTER_NAME]
        return {"weight": _low_rank(_float32(b), _float32(a), scale, True, magnitude)}
    a, b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME]
    deltas = {"weight": _low_rank(_float32(b.weight), _float32(a), scale, module.fan_in_fan_out, magnitude)}
    if b.bias is not None:
        change = _float32(b.bias) * scale
        deltas["bias"] = WeightDelta(lambda weight, row: weight.add_(change[row : row + len(weight)]))
    return deltas


def _low_rank(
    b: torch.Tensor, a: torch.Tensor, scale: float, transposed: bool = False, magnitude: torch.Tensor | None = None
) -> WeightDelta:
    """W + s B A, of a weight that is (in, out) where `transposed`. With DoRA's magnitudes m its rows are then scaled to
    these lengths (arXiv 2402.09353, equation 5)."""

    def apply(weight: torch.Tensor, row: int) -> torch.Tensor:
        rows = slice(row, row + len(weight))
        if transposed:
            weight.addmm_(a[:, rows].T, b.T, alpha=scale)
        else:
            weight.addmm_(b[rows], a, alpha=scale)
        if magnitude is not None:
            lengths = torch.linalg.vector_norm(weight, dim=0 if transposed else 1, keepdim=True)
            weight.mul_((magnitude.flatten()[None] if transposed else magnitude.flatten()[rows, None]) / lengths)
        return weight

    return WeightDelta(apply, by_rows=magnitude is None or not transposed)


def _experts(module: ParamWrapper) -> WeightDelta:
    """A matrix for each expert, each with its own A and B."""
    a, b = (_float32(half[ADAPTER_NAME].weight) for half in (module.lora_A, module.lora_B))
    scale = module.scaling[ADAPTER_NAME]
    if module.get_param().ndim == 2:
        return _low_rank(b, a, scale)
    of_a, of_b = LowRankFactors(a, b, experts=module.num_experts).stacks()

    def apply(weight: torch.Tensor, row: int) -> torch.Tensor:
        for expert, matrix in enumerate(weight, row):
            linear = matrix if module._did_swap_in_out_features else matrix.T
            linear.addmm_(of_b[expert], of_a[expert], alpha=scale)
        return weight

    return WeightDelta(apply)


def _replacement(trained: torch.Tensor, rows: tuple[int, ...] | None = None) -> WeightDelta:
    """The trained weight in place of the base's, or some `rows` of it: the embeddings of some tokens."""

    def apply(weight: torch.Tensor, row: int) -> torch.Tensor:
        if rows is None:
            return trained[row : row + len(weight)] if weight.ndim else trained
        for number, values in zip(rows, trained, strict=True):
            if row <= number < row + len(weight):
                weight[number - row] = values
        return weight

    return WeightDelta(apply, replaces=(rows, trained))


def _float32(parameter: Any) -> torch.Tensor:
    values: torch.Tensor = parameter.detach().float()
    return values
