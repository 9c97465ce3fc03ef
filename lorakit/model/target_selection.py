"""The choice of weights: what `adapter.targets`, `exclude` and `layers` mean among a model's weights. No torch here."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from lorakit.errors import UserError
from lorakit.model.patterns import match_pattern
from lorakit.model.spec import WeightSpec
from lorakit.recipe.adapter_kind import adapter_spec, trains_all
from lorakit.recipe.schema import Adapter, Spectrum
from lorakit.registry import ADAPTERS

_HALVES = {"all-linear": ("attention", "mlp", ""), "attention": ("attention",), "mlp": ("mlp",)}


def select_weights(
    weights: list[WeightSpec],
    settings: Adapter,
    kind_adapts_experts: bool,
    signal: Callable[[list[str]], dict[str, float]] | None = None,
) -> tuple[list[WeightSpec], list[str]]:
    """The weights that an adapter section chooses, and a sentence on each that its words leave out on their own.

    Args:
        weights: all of a model's.
        kind_adapts_experts: whether the adapter's kind can be put on the fused weights of experts.
        signal: paths of weights -> their signal-to-noise ratios, for `layers: {spectrum: ...}`.

    Raises:
        UserError: a name, a pattern or a number that matches nothing of this model, or a choice that cannot be adapted;
            the message says what the model has.
    """
    chosen, notes = _by_target(weights, settings, kind_adapts_experts)
    chosen = _without_excluded(chosen, weights, settings.exclude)
    if settings.layers != "all":
        chosen = _in_layers(chosen, weights, settings, signal)
    _check_adaptable(chosen, settings, kind_adapts_experts)
    return chosen, notes


def _by_target(
    weights: list[WeightSpec], settings: Adapter, adapts_experts: bool
) -> tuple[list[WeightSpec], list[str]]:
    targets = settings.targets
    if isinstance(targets, list):
        for name in targets:
            if not any(_named(weight.path, name) for weight in weights):
                raise _nothing("adapter.targets", name, weights)
        return [weight for weight in weights if any(_named(weight.path, name) for name in targets)], []
    if targets not in _HALVES:
        fit = match_pattern(targets, (weight.path for weight in weights), "adapter.targets")
        chosen = [weight for weight in weights if weight.path in fit]
        if not chosen:
            remedy = f" Write it as a list: [{targets}]." if any(_named(w.path, targets) for w in weights) else ""
            raise _nothing("adapter.targets", targets, weights, remedy)
        return chosen, []
    meant = [weight for weight in weights if weight.sublayer in _HALVES[targets] and not weight.is_head]
    reasons = {weight.path: weight.skip_reason or _hindrance(weight, settings, adapts_experts) for weight in meant}
    chosen = [weight for weight in meant if not reasons[weight.path]]
    if not chosen:
        raise _nothing("adapter.targets", targets, weights)
    return chosen, _notes(targets, reasons)


def _notes(word: str, reasons: dict[str, str]) -> list[str]:
    apart = defaultdict(list)
    for path, reason in reasons.items():
        if reason:
            apart[reason].append(path)
    return [f"adapter.targets: {word} leaves out {_shown(paths)}: {reason}" for reason, paths in apart.items()]


def _hindrance(weight: WeightSpec, settings: Adapter, adapts_experts: bool) -> str:
    """Why the adapter's kind cannot be put on a layer; nothing where it can, or where the weights are trained."""
    if trains_all(settings):
        return ""
    if weight.peft_renames and not adapts_experts:
        return f"PEFT takes its name for that of fused experts, which {adapter_spec(settings).name} does not adapt"
    if weight.peft_renames and weight.quantized:
        return "PEFT takes its name for that of fused experts, and it is quantized"
    return weight.unadaptable


def _without_excluded(chosen: list[WeightSpec], weights: list[WeightSpec], exclude: list[str]) -> list[WeightSpec]:
    # What the words leave out on their own may be excluded once more.
    aside = {weight.path for weight in weights if weight.skip_reason or weight.unadaptable or weight.is_head}
    excludable = aside | {weight.path for weight in chosen}
    kept = chosen
    for pattern in exclude:
        hit = _matching(excludable, pattern, "adapter.exclude")
        if not hit:
            raise _nothing("adapter.exclude", pattern, chosen)
        kept = [weight for weight in kept if weight.path not in hit]
    if not kept:
        raise UserError("adapter.exclude takes away every module that adapter.targets chose. Exclude less.")
    return kept


def _in_layers(
    chosen: list[WeightSpec],
    weights: list[WeightSpec],
    settings: Adapter,
    signal: Callable[[list[str]], dict[str, float]] | None,
) -> list[WeightSpec]:
    numbered = [weight for weight in chosen if weight.layer is not None]
    if not numbered:
        raise UserError(
            "adapter.layers: no module that adapter.targets chose is in a numbered layer. Write layers: all."
        )
    if isinstance(settings.layers, Spectrum):
        if signal is None:
            raise UserError(
                "adapter.layers: spectrum is chosen by the model's weights, which are not at hand here. Write a range "
                "such as 8-15, or run lorakit train."
            )
        best = top_by_snr(signal([weight.path for weight in numbered]), settings.layers.spectrum)
        return [weight for weight in numbered if weight.path in best]
    known = _layers([*chosen, *(weight for weight in weights if not weight.skip_reason)])
    wanted: set[int] = set()
    for first, last in _layer_ranges(settings.layers):
        for number in (first, last):
            if number not in known:
                has = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
                raise UserError(f"adapter.layers: {number} is not a layer of the model: this model has {has}.")
        wanted.update(range(first, last + 1))
    inside = [weight for weight in numbered if weight.layer in wanted]
    if not inside:
        where = ", ".join(map(str, _layers(chosen)))
        raise UserError(f"adapter.layers: no module that adapter.targets chose is in these; they are in {where}.")
    return inside


def _layers(weights: list[WeightSpec]) -> list[int]:
    return sorted({weight.layer for weight in weights if weight.layer is not None})


def _layer_ranges(layers: str | list[int | str]) -> list[tuple[int, int]]:
    """The first and the last number of each range; of a single number it is both."""
    ends = [str(item).partition("-")[::2] for item in (layers if isinstance(layers, list) else [layers])]
    return [(int(first), int(last or first)) for first, last in ends]


def top_by_snr(ratios: dict[str, float], share: float) -> set[str]:
    """The top share of the paths of each type by signal-to-noise ratio, one of each at least.

    A type is what paths have in common when their numbers are left out.
    """
    types = defaultdict(list)
    for path in ratios:
        types[re.sub(r"(?<=\.)\d+(?=\.)", "*", path)].append(path)
    return {
        path
        for paths in types.values()
        for path in sorted(paths, key=lambda path: -ratios[path])[: max(1, round(share * len(paths)))]
    }


def _check_adaptable(chosen: list[WeightSpec], settings: Adapter, adapts_experts: bool) -> None:
    for weight in chosen:
        reason = _hindrance(weight, settings, adapts_experts)
        if reason:
            name = weight.path.rsplit(".", 1)[-1]
            remedy = f"adapter.train_modules: [{name}] instead" if weight.is_head else f"adapter.exclude: [{name}]"
            raise UserError(f"adapter.targets: {weight.path} cannot get an adapter: {reason}. Write {remedy}.")
    fused = [weight.path for weight in chosen if weight.fused]
    names = ", ".join(sorted({path.split(".")[-2] for path in fused}))
    if fused and not adapts_experts:
        able = ", ".join(entry.name for entry in ADAPTERS if entry.experts)
        raise UserError(
            f"adapter.targets: {_shown(fused)} holds the weights of several experts, which adapter.kind "
            f"{adapter_spec(settings).name} cannot adapt; {able} can. Write adapter.exclude: [{names}]."
        )
    parameters = [weight.path for weight in chosen if weight.parameter]
    if parameters and settings.dropout and not trains_all(settings):
        remedy = f"dropout: 0, or adapter.exclude: [{names}]" if len(fused) == len(parameters) else "dropout: 0"
        raise UserError(
            f"adapter.dropout: {settings.dropout:g} cannot be applied to {_shown(parameters)}, which PEFT adapts as a "
            f"parameter. Write {remedy}."
        )


def resolve_overrides(key: str, chosen: list[WeightSpec], overrides: Any, usual: float) -> dict[str, Any]:
    """Path of a chosen weight, as PEFT has to be given it -> its own rank or alpha, where that is not the usual one.

    Raises:
        UserError: a pattern matches nothing that is chosen.
    """
    values = {}
    for pattern, value in overrides.items():
        fit = _matching({weight.path for weight in chosen}, pattern, f"adapter.{key}")
        hit = [weight for weight in chosen if weight.path in fit]
        if not hit:
            raise _nothing(f"adapter.{key}", pattern, chosen)
        values.update({weight.parameter or weight.path: value for weight in hit})
    return {path: value for path, value in values.items() if value != usual}


def _named(path: str, name: str) -> bool:
    """Whether a name is a run of whole parts of a path: all of it, its end, or a part such as `experts`."""
    return f".{name}." in f".{path}."


def _matching(paths: set[str], pattern: str, key: str) -> set[str]:
    """The paths that hold a name, or that a pattern fits."""
    named = {path for path in paths if _named(path, pattern)}
    return named | match_pattern(pattern, paths - named, key)


def _shown(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _nothing(key: str, pattern: str, weights: Iterable[WeightSpec], remedy: str = "") -> UserError:
    counts = Counter(weight.path.rsplit(".", 1)[-1] for weight in weights)
    names = ", ".join(f"{name} ({count})" for name, count in counts.items())
    where = "linear layer of this model, which has" if key == "adapter.targets" else "chosen module; chosen are"
    return UserError(f"{key}: {pattern!r} matches no {where} {names}.{remedy}")
