"""Target selection: which weights of a model get an adapter, of which rank, and which modules are trained whole.

`lorakit plan` selects among counted weights, so torch and PEFT are imported only by the functions that get a model.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.bounds import TooLong, bounded
from lorakit.errors import UserError
from lorakit.model.spec import WeightSpec
from lorakit.recipe.adapter_kind import adapter_spec, trains_all
from lorakit.recipe.problem import one_line
from lorakit.recipe.schema import Adapter, Spectrum
from lorakit.registry import ADAPTERS

Signal = Callable[[list[str]], dict[str, float]]
"""Paths of weights -> their signal-to-noise ratios."""

_SECONDS = 10  # that a pattern may search names
_NO_MODULE = "no module that adapter.targets chose is"
_SUBLAYERS = {"all-linear": ("attention", "mlp", ""), "attention": ("attention",), "mlp": ("mlp",)}


@dataclass(frozen=True)
class Targets:
    """What an adapter is put on, in PEFT's terms."""

    modules: list[str]  # full paths of linear layers
    # Full paths of parameters: the fused weights of experts (experts, rows, columns), and the weights (out, in) of
    # layers whose names PEFT would take for theirs.
    experts: list[str]
    ranks: dict[str, int]  # full path -> rank, where it is not the recipe's
    alphas: dict[str, float]  # full path -> alpha, where it is not the recipe's
    whole: list[str]  # full paths of the modules that are trained whole; of tied embeddings both ends
    tied: bool  # whether `whole` has embeddings that the model ties to its output head
    notes: list[str]  # what the words of `adapter.targets` left out on their own, and why: one sentence each
    # Full path of an embedding or output head -> the rows of it that alone are trained. A head that is tied to the
    # embeddings goes with them, unnamed.
    tokens: dict[str, list[int]] = field(default_factory=dict)


def select_targets(
    model: Any, settings: Adapter, signal: Signal | None = None, new_rows: Sequence[int] = ()
) -> Targets:
    """What an adapter section chooses of a causal language model; UserError where the model has no such thing.
    `new_rows`: those of its embeddings that are trained since they are new."""
    from lorakit.model.spec_from_meta import list_weights

    chosen, notes = select_weights(list_weights(model), settings, signal)
    whole, tied = select_train_modules(model, settings.train_modules, [weight.path for weight in chosen])
    if tied:
        notes.append(f"{' and '.join(whole[:2])} are one weight in this model, and are trained as one")
    modules = [weight.path for weight in chosen if not weight.parameter]
    experts = [weight.parameter for weight in chosen if weight.parameter]
    ranks = resolve_overrides("rank_overrides", chosen, settings.rank_overrides, settings.rank)
    alphas = resolve_overrides("alpha_overrides", chosen, settings.alpha_overrides, settings.alpha)
    tokens = _select_token_rows(model, whole, new_rows) if new_rows and not trains_all(settings) else {}
    return Targets(modules, experts, ranks, alphas, whole, tied, notes, tokens)


def trains_every_weight(settings: Adapter) -> bool:
    """Whether nothing narrows the modules down: full fine-tuning then trains embeddings, norms and biases as well."""
    return settings.targets == "all-linear" and not settings.exclude and settings.layers == "all"


def select_weights(
    weights: list[WeightSpec], settings: Adapter, signal: Signal | None = None
) -> tuple[list[WeightSpec], list[str]]:
    """The weights that an adapter section chooses, and a sentence on each that its words leave out. `signal` is for
    `layers: {spectrum: ...}`. UserError where a name, pattern or number matches nothing, or cannot be adapted."""
    chosen, notes = _select_by_target(weights, settings)
    # What the words leave out on their own may be excluded once more.
    unchosen = {weight.path for weight in weights if weight.skip_reason or weight.unadaptable or weight.is_head}
    excludable = unchosen | {weight.path for weight in chosen}
    excluded = {path for pattern in settings.exclude for path in _matching(excludable, pattern, "exclude", chosen)}
    chosen = [weight for weight in chosen if weight.path not in excluded]
    if not chosen:
        raise UserError("adapter.exclude takes away every module that adapter.targets chose. Exclude less.")
    if settings.layers != "all":
        chosen = _select_layers(chosen, weights, settings, signal)
    _check_adaptable(chosen, settings)
    return chosen, notes


def _select_by_target(weights: list[WeightSpec], settings: Adapter) -> tuple[list[WeightSpec], list[str]]:
    targets = settings.targets
    if isinstance(targets, list):
        for name in targets:
            if not any(_is_named(weight.path, name) for weight in weights):
                raise _matches_nothing("targets", name, weights)
        return [weight for weight in weights if any(_is_named(weight.path, name) for name in targets)], []
    if targets not in _SUBLAYERS:
        fitting = match_pattern(targets, (weight.path for weight in weights), "adapter.targets")
        if not fitting:
            is_name = any(_is_named(weight.path, targets) for weight in weights)
            remedy = f" Write it as a list: [{targets}]." if is_name else ""
            raise _matches_nothing("targets", targets, weights, remedy)
        return [weight for weight in weights if weight.path in fitting], []
    chosen, left_out = [], defaultdict(list)
    for weight in weights:
        if weight.sublayer in _SUBLAYERS[targets] and not weight.is_head:
            reason = weight.skip_reason or _obstacle(weight, settings)
            if reason:
                left_out[reason].append(weight.path)
            else:
                chosen.append(weight)
    if not chosen:
        raise _matches_nothing("targets", targets, weights)
    begin = f"adapter.targets: {targets} leaves out"
    notes = [f"{begin} {first_and_count(paths)}: {why}" for why, paths in left_out.items()]
    return chosen, notes


def _obstacle(weight: WeightSpec, settings: Adapter) -> str:
    """Why the adapter's kind cannot be put on a layer; empty where it can, or where the weights are trained."""
    if trains_all(settings):
        return ""
    kind = adapter_spec(settings)
    if weight.peft_renames and not kind.experts:
        return f"PEFT takes its name for that of fused experts, which {kind.name} does not adapt"
    if weight.peft_renames and weight.quantized:
        return "PEFT takes its name for that of fused experts, and it is quantized"
    return weight.unadaptable


def _select_layers(
    chosen: list[WeightSpec], weights: list[WeightSpec], settings: Adapter, signal: Signal | None
) -> list[WeightSpec]:
    numbered = [weight for weight in chosen if weight.layer is not None]
    if not numbered:
        raise UserError(f"adapter.layers: {_NO_MODULE} in a numbered layer. Write layers: all.")
    layers = settings.layers
    if isinstance(layers, Spectrum):
        if signal is None:
            reason = "spectrum chooses by the model's weights, which are not loaded here"
            raise UserError(f"adapter.layers: {reason}. Write a range such as 8-15, or run lorakit train.")
        best = top_by_snr(signal([weight.path for weight in numbered]), layers.spectrum)
        return [weight for weight in numbered if weight.path in best]
    known = _layer_numbers([*chosen, *(weight for weight in weights if not weight.skip_reason)])
    wanted: set[int] = set()
    for item in layers if isinstance(layers, list) else [layers]:
        first, _, last = str(item).partition("-")
        span = range(int(first), int(last or first) + 1)
        for number in (span[0], span[-1]):
            if number not in known:
                has = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
                raise UserError(f"adapter.layers: {number} is not a layer of the model: this model has {has}.")
        wanted.update(span)
    inside = [weight for weight in numbered if weight.layer in wanted]
    if not inside:
        where = ", ".join(map(str, _layer_numbers(chosen)))
        raise UserError(f"adapter.layers: {_NO_MODULE} in these; they are in {where}.")
    return inside


def _layer_numbers(weights: list[WeightSpec]) -> list[int]:
    return sorted({weight.layer for weight in weights if weight.layer is not None})


def top_by_snr(ratios: dict[str, float], share: float) -> set[str]:
    """The top share of each type of path by signal-to-noise ratio, at least one; numbers do not count for the type."""
    types = defaultdict(list)
    for path in ratios:
        types[re.sub(r"(?<=\.)\d+(?=\.)", "*", path)].append(path)
    top: set[str] = set()
    for paths in types.values():
        paths.sort(key=lambda path: -ratios[path])
        top.update(paths[: max(1, round(share * len(paths)))])
    return top


def _check_adaptable(chosen: list[WeightSpec], settings: Adapter) -> None:
    for weight in chosen:
        if reason := _obstacle(weight, settings):
            name = weight.path.rsplit(".", 1)[-1]
            remedy = f"adapter.train_modules: [{name}] instead" if weight.is_head else f"adapter.exclude: [{name}]"
            raise UserError(f"adapter.targets: {weight.path} cannot get an adapter: {reason}. Write {remedy}.")
    fused = [weight.path for weight in chosen if weight.fused]
    names = ", ".join(sorted({path.split(".")[-2] for path in fused}))
    kind = adapter_spec(settings)
    if fused and not kind.experts:
        able = ", ".join(entry.name for entry in ADAPTERS if entry.experts)
        what = f"{first_and_count(fused)} holds the weights of several experts"
        reason = f"{what}, which adapter.kind {kind.name} cannot adapt; {able} can"
        raise UserError(f"adapter.targets: {reason}. Write adapter.exclude: [{names}].")
    parameters = [weight.path for weight in chosen if weight.parameter]
    if parameters and settings.dropout and not trains_all(settings):
        what = f"{first_and_count(parameters)}, which PEFT adapts as a parameter"
        remedy = f"dropout: 0, or adapter.exclude: [{names}]" if len(fused) == len(parameters) else "dropout: 0"
        raise UserError(f"adapter.dropout: {settings.dropout:g} cannot be applied to {what}. Write {remedy}.")


def resolve_overrides(key: str, chosen: list[WeightSpec], overrides: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """Path of a chosen weight, as PEFT needs it -> its own rank or alpha, where that is not the usual one. UserError
    where a pattern matches nothing that is chosen."""
    values: dict[str, Any] = {}
    for pattern, value in overrides.items():
        fitting = _matching({weight.path for weight in chosen}, pattern, key, chosen)
        values |= {weight.parameter or weight.path: value for weight in chosen if weight.path in fitting}
    return {path: value for path, value in values.items() if value != usual}


def _is_named(path: str, name: str) -> bool:
    """Whether a name is a run of whole parts of a path: all of it, its end, or a part such as `experts`."""
    return f".{name}." in f".{path}."


def _matching(paths: set[str], pattern: str, key: str, chosen: list[WeightSpec]) -> set[str]:
    """The paths that hold a name, or that a pattern fits. `chosen`: for the error where there are none."""
    named = {path for path in paths if _is_named(path, pattern)}
    fitting = named | match_pattern(pattern, paths - named, f"adapter.{key}")
    if not fitting:
        raise _matches_nothing(key, pattern, chosen)
    return fitting


def first_and_count(paths: list[str]) -> str:
    """The first of some names, and how many there are besides."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _matches_nothing(key: str, pattern: str, weights: list[WeightSpec], remedy: str = "") -> UserError:
    where = "linear layer of this model, which has" if key == "targets" else "chosen module; chosen are"
    names = _names_with_counts(weight.path for weight in weights)
    return UserError(f"adapter.{key}: {pattern!r} matches no {where} {names}.{remedy}")


def _names_with_counts(paths: Iterable[str]) -> str:
    counts = Counter(path.rsplit(".", 1)[-1] for path in paths)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def select_train_modules(model: Any, names: list[str], adapted: list[str]) -> tuple[list[str], bool]:
    """`adapter.train_modules` -> the full paths of the modules, and whether tied embeddings are among them: both ends
    then are, the input first, so that PEFT keeps them tied. A name is a full path or its end in whole parts; `adapted`
    are the paths that get an adapter. UserError where a name means nothing, or what cannot be trained whole."""
    modules = dict(model.named_modules())
    paths: list[str] = []
    for name in names:
        hit = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not hit:
            own = (path for path, module in modules.items() if any(True for _ in module.parameters(recurse=False)))
            reason = f"{name!r} is not a module of this model, which has {_names_with_counts(own)}"
            raise UserError(f"adapter.train_modules: {reason}.")
        for path in hit:
            if both := [other for other in adapted if f"{other}.".startswith(f"{path}.")]:
                reason = f"{path} would be trained whole, and {both[0]} by an adapter"
                remedy = f"Remove it here, or write adapter.exclude: [{path.rsplit('.', 1)[-1]}]."
                raise UserError(f"adapter.train_modules: {reason}. {remedy}")
            weights = list(modules[path].parameters())
            if not weights:
                raise UserError(f"adapter.train_modules: {path} has no weights to train. Remove it.")
            if not all(weight.is_floating_point() for weight in weights):
                raise UserError(f"adapter.train_modules: {path} is quantized, and cannot be trained whole. Remove it.")
        paths += [path for path in hit if path not in paths]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    whole, tied = _with_tied_ends(model, modules, outer)
    # PEFT compares the ends of paths as texts.
    others = [path for path in modules if path.endswith(tuple(whole)) and path not in whole]
    if others:
        raise UserError(f"adapter.train_modules: PEFT cannot tell {', '.join(others)} from {', '.join(names)}.")
    return whole, tied


def _with_tied_ends(model: Any, modules: dict[str, Any], paths: list[str]) -> tuple[list[str], bool]:
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return paths, False
    ends = [next(path for path, module in modules.items() if module is end) for end in (embeddings, head)]
    if not set(ends) & set(paths):
        return paths, False
    if not any(path.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for path in ends):
        reason = f"PEFT would separate: it ties only {' and '.join(EMBEDDING_LAYER_NAMES)}"
        raise UserError(f"adapter.train_modules: {ends[0]} and {ends[1]} are one weight, which {reason}. Remove it.")
    return [*ends, *(path for path in paths if path not in ends)], True


def _select_token_rows(model: Any, whole: list[str], rows: Sequence[int]) -> dict[str, list[int]]:
    """The ends of the model whose new rows are trained: those that are not trained whole anyway. UserError where PEFT
    would train others, or lose something of theirs."""
    from torch.nn import Embedding, Linear

    modules = dict(model.named_modules())
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is inputs.weight
    if tied and not model.config.to_dict().get("tie_word_embeddings"):  # by which PEFT goes
        raise UserError("model.add_tokens: PEFT would separate the tied embeddings of this model. Leave it out.")
    ends = [inputs] if tied or head is None else [inputs, head]
    paths = [next(path for path, module in modules.items() if module is end) for end in ends]
    for path, end in zip(paths, ends, strict=True):
        if not (isinstance(end, Embedding | Linear) and end.weight.is_floating_point()):
            reason = f"{path} is a {type(end).__name__}, of which PEFT cannot train single rows"
            raise UserError(f"model.add_tokens: {reason}. Leave it out.")
        if end is head and head.bias is not None:
            reason = f"{path} has a bias, which PEFT leaves out where it trains single rows"
            raise UserError(f"model.add_tokens: {reason}. Leave it out.")
        if others := [other for other in modules if other.endswith(path) and other != path]:  # as texts
            raise UserError(f"model.add_tokens: PEFT cannot tell {', '.join(others)} from {path}. Leave it out.")
    return {path: list(rows) for path in paths if path not in whole}


def match_pattern(pattern: str, names: Iterable[str], key: str) -> set[str]:
    """The names that a pattern, written at `key`, fits as a whole; UserError where it is none, or searches too long."""
    try:
        with bounded(_SECONDS):
            compiled = re.compile(pattern)
            return {name for name in names if compiled.fullmatch(name)}
    except TooLong as error:
        reason = f"{one_line(repr(pattern))} searches the modules' names for more than {_SECONDS} s"
        remedy = "One that repeats a repetition, such as (a+)+, tries every way to share out a name: write it simpler."
        raise UserError(f"{key}: the pattern {reason}. {remedy}") from error
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: {one_line(repr(pattern))} is not a regular expression: {error}.") from error


def check_patterns(config: Any, names: Sequence[str], key: str) -> None:
    """Try the patterns of PEFT's configuration of an adapter on a model's modules, as PEFT does without a bound."""
    whole = [getattr(config, field, None) for field in ("target_modules", "exclude_modules")]
    parts = [part for field in ("rank_pattern", "alpha_pattern") for part in getattr(config, field, None) or ()]
    for pattern in [text for text in whole if isinstance(text, str)]:
        match_pattern(pattern, names, key)
    for pattern in parts:
        if any(sign in pattern for sign in "*+{"):  # nothing else repeats
            match_pattern(rf"(.*\.)?({pattern})", names, key)
