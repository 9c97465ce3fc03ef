"""How far two adapters lie apart: the Frobenius norm of the difference of their changes of each weight, scale * B A,
from the factors alone. No base and no B A is needed."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from lorakit.errors import UserError
from lorakit.model.base_files import StoredTensor, read_header
from lorakit.model.low_rank import PREFIX, LowRankFactors, squared_norm
from lorakit.model.safetensors_io import read_tensor
from lorakit.progress import Progress
from lorakit.recipe.init_adapter import read_adapter_config

_HALVES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}  # A's name, and B's


@dataclass(frozen=True)
class Distance:
    """How far the change of one module lies from another adapter's: Frobenius norms of both and of the difference. A
    module that one adapter lacks is not changed by it: its norm is 0."""

    module: str
    norm_a: float
    norm_b: float
    distance: float

    @property
    def relative(self) -> float | None:
        """The distance as a share of the first change; None where that is nothing and the second is not."""
        return self.distance / self.norm_a if self.norm_a else None if self.distance else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"relative": self.relative}


@dataclass(frozen=True)
class AdapterDistance:
    """`modules` by their distance, the largest first, and all of them as one change in `total`. `tensors`: what is
    trained as it is, such as whole modules and DoRA's magnitudes, compared as stored. `unlike`: modules or tensors that
    have other shapes in the two adapters."""

    total: Distance
    modules: tuple[Distance, ...]
    tensors: tuple[Distance, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    unlike: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        parts = {name: [one.to_dict() for one in getattr(self, name)] for name in ("modules", "tensors")}
        names = {name: list(getattr(self, name)) for name in ("only_a", "only_b", "unlike")}
        return {"total": self.total.to_dict(), **parts, **names}


@dataclass(frozen=True)
class _StoredChange:
    a: StoredTensor
    b: StoredTensor
    scale: float
    experts: int

    def read(self) -> LowRankFactors:
        a, b = (read_tensor(half, torch.float32) for half in (self.a, self.b))
        return LowRankFactors(a, b, self.scale, self.experts)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.b.shape[0], self.a.shape[1], self.experts


def compare_adapters(first: Path, second: Path, progress: Progress) -> AdapterDistance:
    """The distance of two adapters in PEFT's format on the same base, a module at a time in memory. UserError where one
    is damaged or of a kind that has no A and B."""
    (changes_a, others_a), (changes_b, others_b) = _read(first), _read(second)
    modules, tensors, unlike = [], [], []
    names = sorted({*changes_a, *changes_b})
    with progress.bar("comparing adapters", len(names)) as bar:
        for name in names:
            a, b = changes_a.get(name), changes_b.get(name)
            if a and b and a.shape != b.shape:
                unlike.append(name)
            else:
                modules.append(_distance(name, a.read() if a else None, b.read() if b else None))
            bar.advance()
    for name in sorted(others_a.keys() & others_b.keys()):
        if others_a[name].shape == others_b[name].shape:
            tensors.append(_tensor_distance(name, others_a[name], others_b[name]))
        else:
            unlike.append(name)
    all_a, all_b = {*changes_a, *others_a}, {*changes_b, *others_b}
    return AdapterDistance(
        _total(modules),
        _by_distance(modules),
        _by_distance(tensors),
        tuple(sorted(all_a - all_b)),
        tuple(sorted(all_b - all_a)),
        tuple(unlike),
    )


def _read(folder: Path) -> tuple[dict[str, _StoredChange], dict[str, StoredTensor]]:
    """The low-rank changes of an adapter by module, and its other tensors, by their names in the base."""
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: an adapter of the type {config.get('peft_type')}: only LoRA and DoRA have A and B.")
    stored, _ = read_header(folder / "adapter_model.safetensors")
    changes, others = {}, dict(stored)
    for name, a in stored.items():
        ending = next((ending for ending in _HALVES if name.endswith(ending)), None)
        if ending is None:
            continue
        stem = name.removesuffix(ending)
        b = others.pop(stem + _HALVES[ending], None)
        if b is None or len(a.shape) != 2 or len(b.shape) != 2:
            raise UserError(f"{folder}: its adapter is damaged: {name} has no B, or another shape than a matrix.")
        del others[name]
        module = stem.removeprefix(PREFIX)
        scale, experts = _scale(config, module, a, folder)
        changes[module] = _StoredChange(a, b, scale, experts)
    return changes, {name.removeprefix(PREFIX): tensor for name, tensor in others.items()}


def _scale(config: dict[str, Any], module: str, a: StoredTensor, folder: Path) -> tuple[float, int]:
    """What PEFT multiplies B A by (LoraModel._create_and_replace and LoraLayer.update_layer), and the experts that the
    module's weight holds, whose ranks lie in one A."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    experts, rest = divmod(a.shape[0], rank)
    if rest or not experts or (experts > 1 and not config.get("target_parameters")):
        raise UserError(f"{folder}: its adapter is damaged: {module} has {a.shape[0]} ranks, its configuration {rank}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), experts


def _distance(name: str, a: LowRankFactors | None, b: LowRankFactors | None) -> Distance:
    of_a, of_b = ([(one, weight)] if one else [] for one, weight in ((a, 1.0), (b, -1.0)))
    norms = (math.sqrt(squared_norm(terms)) for terms in (of_a, of_b, [*of_a, *of_b]))
    return Distance(name, *norms)


def _tensor_distance(name: str, first: StoredTensor, second: StoredTensor) -> Distance:
    a, b = (read_tensor(tensor, torch.float32) for tensor in (first, second))
    return Distance(name, *(float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in (a, b, a - b)))


def _total(modules: Iterable[Distance]) -> Distance:
    columns = [(one.norm_a, one.norm_b, one.distance) for one in modules]
    return Distance("", *(math.hypot(*column) for column in zip(*columns, strict=True)) if columns else (0.0, 0.0, 0.0))


def _by_distance(parts: list[Distance]) -> tuple[Distance, ...]:
    return tuple(sorted(parts, key=lambda one: (-one.distance, one.module)))
