"""What a recipe's adapter section trains of a model, counted from the model's spec. No torch here."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.model.spec import ModelSpec, WeightSpec
from lorakit.model.targets import match_pattern, resolve_overrides, select_weights, trains_every_weight
from lorakit.recipe.adapter_kind import adapter_folder, adapter_spec, initial_adapter, trains_all
from lorakit.recipe.schema import Adapter, Spectrum

# bitsandbytes pages the states of larger tensors only (its optim/optimizer.py, get_state_buffer).
LEAST_PAGED = 100_000


@dataclass(frozen=True)
class TrainableParams:
    """What is trained: low-rank matrices on some weights, modules as a whole, or the weights themselves."""

    ranks: dict[str, int]  # path of an adapted weight -> its rank; empty in full fine-tuning
    matrices: int  # trained numbers in the low-rank matrices, magnitudes and other parts of the adapter
    whole: int  # trained numbers in `adapter.train_modules`, or in full fine-tuning
    beside: int = 0  # frozen numbers that the adapter holds besides, such as what PiSSA began with
    copied: int = 0  # numbers of `train_modules`: the adapter holds a copy, and the base's own stay
    full_fine_tuning: bool = False  # full fine-tuning: the weights themselves
    estimated: bool = False  # whether the choice hangs on the weights themselves (spectrum): the counts are only near
    dora: bool = False
    saved: int = 0  # numbers in the adapter's file, which may be of another rank than what is trained
    first_block: int = 0  # the first block that gradients go back to: below what is trained nothing is kept for them
    small: int = 0  # trained numbers in matrices that are too small for bitsandbytes to page their states
    token_rows: int = 0  # trained numbers in rows of the embeddings, and of an untied head, that are trained alone

    @property
    def trained(self) -> int:
        """All trained numbers."""
        return self.matrices + self.whole + self.token_rows


def count_trainable(spec: ModelSpec, settings: Adapter, new_rows: int = 0) -> TrainableParams:
    """What an adapter section trains of a model; a `UserError` where that is not there or cannot be adapted.
    `new_rows`: how many rows of its embeddings are trained since they are new."""
    if source := initial_adapter(settings):
        return _from_folder(spec, adapter_folder(Path(source)))
    kind, share, estimated = adapter_spec(settings), 1.0, isinstance(settings.layers, Spectrum)
    if isinstance(settings.layers, Spectrum):
        share, settings = settings.layers.spectrum, settings.model_copy(update={"layers": "all"})
    chosen, _ = select_weights(list(spec.weights), settings)
    if trains_all(settings):
        narrowed = estimated or not trains_every_weight(settings)
        numbers = sum(weight.size for weight in chosen) if narrowed else spec.parameters
        first = min((weight.layer or 0 for weight in chosen), default=0) if narrowed else 0
        trained = round(numbers * share)
        return TrainableParams({}, 0, trained, full_fine_tuning=True, estimated=estimated, first_block=first)
    own = resolve_overrides("rank_overrides", chosen, settings.rank_overrides, settings.rank)
    # counts nothing, but its patterns have to match
    resolve_overrides("alpha_overrides", chosen, settings.alpha_overrides, settings.alpha)
    ranks = {weight.path: own.get(weight.parameter or weight.path, settings.rank) for weight in chosen}
    count = kind.numbers or _low_rank
    matrices = sum(weight.experts * count(settings, ranks[weight.path], weight) for weight in chosen)
    plain = sum(weight.experts * _low_rank(settings, ranks[weight.path], weight) for weight in chosen)
    beside = sum(_low_rank(settings, ranks[w.path], w) for w in chosen) if kind.keeps_initial else 0
    every = _adapter(spec, chosen, ranks, matrices, settings.train_modules, kind.name == "dora")
    counted = replace(
        every,
        saved=round(share * (plain if kind.callback else matrices + beside)) + every.whole,
        small=round(share * every.small),
        matrices=round(share * matrices),
        beside=round(share * beside),
        estimated=estimated,
    )
    whole = spec.whole(settings.train_modules)
    return _with_token_rows(counted, spec, {path: new_rows for path in _ends(spec) if path not in whole})


def _adapter(
    spec: ModelSpec, chosen: list[WeightSpec], ranks: dict[str, int], matrices: int, modules: list[str], dora: bool
) -> TrainableParams:
    """Low-rank matrices on the chosen weights, and whole modules."""
    whole = sum(spec.whole(modules).values())
    sizes = (ranks[weight.path] * side * weight.experts for weight in chosen for side in (weight.inner, weight.outer))
    return TrainableParams(
        ranks=ranks,
        matrices=matrices,
        whole=whole,
        copied=whole,
        dora=dora,
        saved=matrices + whole,
        first_block=0 if whole else min((one.layer for one in chosen if one.layer is not None), default=0),
        small=sum(size for size in sizes if size < LEAST_PAGED),
    )


def _ends(spec: ModelSpec) -> list[str]:
    """The embeddings, and the output head where it is not tied to them."""
    heads = (weight.path for weight in spec.weights if weight.is_head)
    return [spec.embeddings, *(path for path in heads if path not in spec.shared)]


def _with_token_rows(adapted: TrainableParams, spec: ModelSpec, rows: dict[str, int]) -> TrainableParams:
    """The same with so many single rows of the embeddings, or of the head."""
    sizes = [count * (spec.modules[path] // spec.vocabulary) for path, count in rows.items() if count]
    if not sizes:
        return adapted
    return replace(
        adapted,
        token_rows=sum(sizes),
        saved=adapted.saved + sum(sizes),
        small=adapted.small + sum(size for size in sizes if size < LEAST_PAGED),
        first_block=0,
    )


def count_parameters(spec: ModelSpec, settings: Adapter, new_rows: int = 0) -> tuple[int, int]:
    """Trainable and all parameters of a model with a recipe's adapter, as PEFT counts them."""
    adapted = count_trainable(spec, settings, new_rows)
    if adapted.full_fine_tuning:
        return adapted.trained, spec.parameters
    # PEFT's layers for B diag(E) A hold one more number each, `ranknum`.
    counters = len(adapted.ranks) if adapter_spec(settings).callback and not initial_adapter(settings) else 0
    return adapted.trained, spec.parameters + adapted.trained + counters


def _low_rank(settings: Any, rank: int, weight: Any) -> int:
    return rank * (weight.inner + weight.outer)


# What PEFT makes of the layers that a fused weight of experts was made from (transformers 4 had one for each expert):
# the weight's name, and how many of them lie in it.
_FUSED = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), ("gate_up_proj", 2)) | {"w2": ("down_proj", 1)}


def _from_folder(spec: ModelSpec, folder: Path) -> TrainableParams:
    """The adapter of a folder in PEFT's format, by its configuration. What PEFT ignores in it is ignored here too."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank, own, targets = int(config.get("r", 8)), config.get("rank_pattern") or {}, config.get("target_modules")
    named = [*_as_list(targets), *_as_list(config.get("target_parameters"))]
    excluded, numbers = config.get("exclude_modules"), _as_list(config.get("layers_to_transform"))
    chosen, ranks, dora = [], dict[str, int](), bool(config.get("use_dora"))
    for weight in spec.weights:
        name = weight.parameter or weight.path
        times = _times_named(weight, targets, named)
        if not times or _is_named(weight.path, excluded) or (numbers and weight.layer not in numbers):
            continue
        chosen.append(weight)
        ranks[weight.path] = next((own[key] for key in own if _fits(rf"(.*\.)?({key})", name)), rank * times)
    matrices = sum(weight.experts * _low_rank(None, ranks[weight.path], weight) for weight in chosen)
    matrices += sum(weight.outer for weight in chosen) if dora else 0
    adapted = _adapter(spec, chosen, ranks, matrices, config.get("modules_to_save") or [], dora)
    indices = config.get("trainable_token_indices") or []
    by_end = indices if isinstance(indices, dict) else {spec.embeddings: indices}
    counts = {end: len(rows) for end in _ends(spec) for name, rows in by_end.items() if end.endswith(name)}
    return _with_token_rows(adapted, spec, counts)


def _times_named(weight: WeightSpec, targets: Any, named: list[str]) -> int:
    """How many of the targets' layers lie in a weight; 0 where none names it."""
    if targets == "all-linear":
        return int(not (weight.fused or weight.is_head))
    if _is_named(weight.path, targets) or _is_named(weight.parameter or weight.path, named):
        return 1
    last = weight.path.rpartition(".")[2]
    parts = {_FUSED[name] for name in (target.rpartition(".")[2] for target in named) if name in _FUSED}
    return next((count for whole, count in parts if weight.fused and whole == last), 0)


def _is_named(path: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return _fits(targets, path)
    return any(path == target or path.endswith(f".{target}") for target in targets or ())


def _fits(pattern: str, path: str) -> bool:
    return bool(match_pattern(pattern, [path], "adapter.from: its adapter_config.json"))


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | int) else list(value or [])
