"""Folding: an adapter's change, added to the weights that it stands on. Everything in float32."""

import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from lorakit.errors import UserError
from lorakit.model.layerwise import is_empty


class WeightDelta(Protocol):
    """What an adapter does to one weight."""

    @property
    def by_rows(self) -> bool:
        """Whether it can be done to some rows of the weight at a time."""

    def __call__(self, weight: torch.Tensor, row: int = 0) -> torch.Tensor:
        """The merged weight, from the float32 weight or its rows from `row` on, which may be changed."""


_NAME = "default"
_OF_ADAPTER = re.compile(rf"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{_NAME}(\.|$)")


@dataclass(frozen=True)
class Folding:
    """What an adapter does to the weights of its base, by their paths in the base model."""

    folds: dict[str, WeightDelta]


def adapter_deltas(model: Any) -> Folding:
    """What the adapter of a PEFT model does to each weight. The base's own weights need not be there.

    Raises:
        UserError: it is of a kind that no weight can hold, or holds numbers that are not finite.
    """
    _check_finite(model)
    folds: dict[str, WeightDelta] = {}
    base = model.base_model.model
    for name, value in base.named_parameters():
        if not _OF_ADAPTER.search(f".{name}") and not is_empty(value):  # a bias, or an embedding that was resized
            folds[_path_in_base(name)] = _Replaced(_plain(value))
    for wrapped, module in base.named_modules():
        path = _path_in_base(wrapped)
        if isinstance(module, ParamWrapper):
            _add(folds, {f"{path}.{module.parameter_name}": _stacked(module)})
        elif isinstance(module, LoraLayer):
            _add(folds, _layer(path, module))
        elif isinstance(module, ModulesToSaveWrapper):
            trained = dict(module.modules_to_save[_NAME].named_parameters())
            folds |= {f"{path}.{name}": _Replaced(_plain(value)) for name, value in trained.items()}
        elif isinstance(module, TrainableTokensWrapper):
            _add(folds, {f"{path}.weight": _tokens(module.token_adapter)})
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            kind = model.peft_config[_NAME].peft_type
            raise UserError(
                f"adapter: {path} is adapted by PEFT's kind {getattr(kind, 'value', kind)}, which lorakit does not add "
                "to weights. Merge it with PEFT's own merge_and_unload."
            )
    return Folding(folds)


def _add(folds: dict[str, WeightDelta], more: dict[str, WeightDelta]) -> None:
    """Further things that are done to weights, after those that are done to them already."""
    for path, fold in more.items():
        folds[path] = _Both(folds[path], fold) if path in folds else fold


def _path_in_base(wrapped: str) -> str:
    """The path of a layer before PEFT wrapped it; fused experts are wrapped once for each of their parameters."""
    parts = wrapped.split(".")
    return ".".join(part for part in parts if part != "base_layer")


def _check_finite(model: Any) -> None:
    for name, value in model.named_parameters():
        if _OF_ADAPTER.search(name) and not bool(value.isfinite().all()):
            short = name.removeprefix("base_model.model.").replace(f".{_NAME}", "")
            raise UserError(
                f"adapter: {short} holds numbers that are not finite. Merging would spoil the model: train again, or "
                "merge an earlier checkpoint."
            )


def _layer(path: str, module: Any) -> dict[str, WeightDelta]:
    embedded = _NAME in module.lora_embedding_A
    if not embedded and _NAME not in module.lora_A:
        return {}
    variant = module.lora_variant.get(_NAME)
    magnitude = module.lora_magnitude_vector[_NAME].weight if _NAME in module.lora_magnitude_vector else None
    base = module.get_base_layer()
    if (variant is not None and magnitude is None) or (embedded and variant) or base.weight.ndim != 2:
        kind = type(base).__name__ if variant is None else getattr(variant, "__name__", type(variant).__name__)
        raise UserError(f"adapter: {path} is adapted in a way ({kind}) that lorakit cannot add to a weight.")
    if embedded:
        down, up = module.lora_embedding_A[_NAME], module.lora_embedding_B[_NAME]
    else:
        down, up = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
    # The weight of an embedding is (tokens, width) and of Conv1D (in, out): both the other way than B A is.
    turned = embedded or module.fan_in_fan_out
    low_rank = _LowRank(_plain(up), _plain(down), module.scaling[_NAME], turned, _plain(magnitude))
    folds: dict[str, WeightDelta] = {f"{path}.weight": low_rank}
    if not embedded and module.lora_B[_NAME].bias is not None:
        folds[f"{path}.bias"] = _Added(_plain(module.lora_B[_NAME].bias) * module.scaling[_NAME])
    return folds


@dataclass(frozen=True)
class _LowRank:
    """W + s B A; with DoRA's magnitudes m, its rows brought to these lengths (arXiv 2402.09353, equation 5)."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    turned: bool
    """Whether the weight is (in, out)."""
    magnitude: torch.Tensor | None

    @property
    def by_rows(self) -> bool:
        return self.magnitude is None or not self.turned

    def __call__(self, weight: torch.Tensor, row: int = 0) -> torch.Tensor:
        chosen = slice(row, row + len(weight))
        if self.turned:
            weight.addmm_(self.down[:, chosen].T, self.up.T, alpha=self.scale)
        else:
            weight.addmm_(self.up[chosen], self.down, alpha=self.scale)
        if self.magnitude is not None:
            along = 0 if self.turned else 1
            lengths = torch.linalg.vector_norm(weight, dim=along, keepdim=True)
            magnitude = self.magnitude.flatten()
            weight.mul_((magnitude[None] if self.turned else magnitude[chosen, None]) / lengths)
        return weight


@dataclass(frozen=True)
class _Stacked:
    """A matrix for each expert, each with its own A and its own columns of B, in PEFT's order."""

    ups: torch.Tensor
    """(out, rank, experts)"""
    downs: torch.Tensor
    """(experts, rank, in)"""
    scale: float
    turned: bool
    by_rows = True

    def __call__(self, weight: torch.Tensor, row: int = 0) -> torch.Tensor:
        for expert, matrix in enumerate(weight, row):
            as_linear = matrix.T if self.turned else matrix
            as_linear.addmm_(self.ups[:, :, expert], self.downs[expert], alpha=self.scale)
        return weight


@dataclass(frozen=True)
class _Added:
    change: torch.Tensor
    by_rows = True

    def __call__(self, weight: torch.Tensor, row: int = 0) -> torch.Tensor:
        return weight.add_(self.change[row : row + len(weight)])


@dataclass(frozen=True)
class _Replaced:
    trained: torch.Tensor
    by_rows = True

    def __call__(self, weight: torch.Tensor, row: int = 0) -> torch.Tensor:
        return self.trained[row : row + len(weight)] if weight.ndim else self.trained


@dataclass(frozen=True)
class _Rows:
    """Rows of a weight in place of the base's: the embeddings of some tokens."""

    numbers: tuple[int, ...]
    trained: torch.Tensor
    by_rows = True

    def __call__(self, weight: torch.Tensor, row: int = 0) -> torch.Tensor:
        for number, trained in zip(self.numbers, self.trained, strict=True):
            if row <= number < row + len(weight):
                weight[number - row] = trained
        return weight


@dataclass(frozen=True)
class _Both:
    """One after the other."""

    first: WeightDelta
    second: WeightDelta

    @property
    def by_rows(self) -> bool:
        return self.first.by_rows and self.second.by_rows

    def __call__(self, weight: torch.Tensor, row: int = 0) -> torch.Tensor:
        changed = self.first(weight, row)
        return self.second(changed.clone() if changed is not weight else changed, row)


def is_same(one: WeightDelta | None, other: WeightDelta | None) -> bool:
    """Whether two folds are known to make the same of the same weight."""
    if isinstance(one, _Replaced) and isinstance(other, _Replaced):
        return torch.equal(one.trained, other.trained)
    if isinstance(one, _Rows) and isinstance(other, _Rows):
        return one.numbers == other.numbers and torch.equal(one.trained, other.trained)
    return one is other


def _tokens(adapter: Any) -> WeightDelta:
    numbers = tuple(int(number) for number in adapter.token_indices[_NAME])
    return _Rows(numbers, _plain(adapter.trainable_tokens_delta[_NAME]))


def _stacked(module: Any) -> WeightDelta:
    up, down = _plain(module.lora_B[_NAME].weight), _plain(module.lora_A[_NAME].weight)
    scale, experts = module.scaling[_NAME], module.num_experts
    if module.get_param().ndim == 2:
        return _LowRank(up, down, scale, False, None)
    downs, ups = down.reshape(experts, -1, down.shape[-1]), up.reshape(up.shape[0], -1, experts)
    return _Stacked(ups, downs, scale, not module._did_swap_in_out_features)


def _plain(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().float()
