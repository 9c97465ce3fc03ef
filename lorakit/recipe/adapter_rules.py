"""Combinations of the model, the adapter and the optimizer that cannot work."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lorakit.recipe.adapter_kind import adapter_spec, initial_adapter, trains_all, unread_keys
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.init_adapter import read_adapter_settings, why_untrainable
from lorakit.recipe.key_aliases import VALUE_ALIASES
from lorakit.recipe.problem import PathParts, quote, show_path
from lorakit.recipe.rule import Conflict, bad_pattern, choice_mistakes, reads
from lorakit.recipe.schema import Recipe
from lorakit.registry import ADAPTERS

TARGET_WORDS = ("all-linear", "attention", "mlp")
_NOTHING: tuple[Any, ...] = (None, {}, [])


@reads("adapter.kind", "adapter.rank")
def kind_can_be_read(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`adapter.kind`, where it is a mapping, names one kind, and the settings of that kind fit each other."""
    example, adapter = "lora, or {pissa: {iterations: 4}}", recipe.adapter
    yield from choice_mistakes(("adapter", "kind"), ADAPTERS, adapter.kind, example, adapter)


@reads("adapter", "model.quantization", "model.double_quant", "train.lora_plus")
def keys_are_read(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """A key that nothing would read, such as `model.double_quant` without 4 bits, is not written."""
    source = initial_adapter(recipe.adapter)
    known = read_adapter_settings(Path(source)) if source else {}
    values = recipe.model_dump()
    for name, reason in unread_keys(recipe).items():
        section, key = name.split(".")
        value = values[section][key]
        if source and section == "adapter" and (not known or known.get(key) == value):
            continue  # nothing is there, which another rule says; or a recipe goes on with its own adapter
        if source and section == "adapter" and key in known:
            reason = f"the adapter of {show_path(Path(source))} has {key} {quote(known[key])}"
        if name in written and value not in _NOTHING:
            other = ", or write quantization: nf4" if name == "model.double_quant" else ""
            yield Conflict((section, key), reason, f"Remove the line{other}.")


@reads("adapter.kind", "model.quantization")
def kind_goes_with_quantization(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`adapter.kind` loftq and none take the base unquantized."""
    kind, quantization = adapter_spec(recipe.adapter), recipe.model.quantization
    if kind.quantizations is None or quantization in kind.quantizations:
        return
    if kind.quantizes:
        reason = f"{kind.name} begins with the full-precision weights, and quantizes them to {kind.quantizes}"
    else:
        reason = f"{quantization} weights cannot be trained themselves, as adapter.kind {kind.name} does"
    remedy = f"Write quantization: none, or another adapter.kind, such as lora with {quantization}."
    yield Conflict(("model", "quantization"), reason, remedy)


@reads("adapter.kind", "train.optimizer")
def kind_goes_with_optimizer(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`adapter.kind` flexlora, whose matrices change their shapes, trains with adamw alone."""
    kind, optimizer = adapter_spec(recipe.adapter), recipe.train.optimizer
    if kind.optimizers is not None and optimizer not in kind.optimizers:
        reason = f"{kind.name} changes the shapes of its matrices, and {optimizer} cannot change its states with them"
        yield Conflict(("train", "optimizer"), reason, "Write optimizer: adamw.")


@reads("adapter.from", "output.dir")
def adapter_can_be_trained_on(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`adapter.from` names a LoRA or DoRA adapter: of an ended run, of a checkpoint, or one that PEFT saved."""
    folder = initial_adapter(recipe.adapter)
    if folder is None or not Path(folder).is_dir():  # reported where the path is checked
        return
    refused = why_untrainable(Path(folder))
    if refused:
        yield Conflict(("adapter", "from"), *refused)
    elif recipe.output.dir and Path(folder).resolve() == Path(recipe.output.dir).resolve():
        yield Conflict(("adapter", "from"), "it is the folder that this run writes to", "Write another output.dir.")


@reads("adapter.kind", "output.merged")
def merged_has_an_adapter(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`output.merged` needs an adapter: `adapter.kind` none has none to merge."""
    if recipe.output.merged and trains_all(recipe.adapter):
        reason = "there is no adapter to merge: adapter.kind none trains the weights themselves"
        yield Conflict(("output", "merged"), reason, "Remove the line; the run's model/ is the trained model.")


@reads("adapter.targets")
def targets_are_readable(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`adapter.targets` is one of `all-linear`, `attention` and `mlp`, or a regular expression, or a list of names."""
    targets = recipe.adapter.targets
    for index, name in enumerate(targets if isinstance(targets, list) else []):
        if name in TARGET_WORDS:
            reason = f"{quote(name)} stands for many modules and is not a module's name"
            several = "module names" if len(targets) > 1 else f"targets: {name}"
            yield Conflict(("adapter", "targets", index), reason, f"Write {several}.")
    if not isinstance(targets, str) or targets in TARGET_WORDS:
        return
    names = [name.strip() for name in targets.split(",")]
    if len(names) > 1 and all(re.fullmatch(r"[\w.-]+", name) for name in names):
        reason = f"{quote(targets)} is one text, not a list of names"
        yield Conflict(("adapter", "targets"), reason, f"Write [{', '.join(names)}].")
        return
    theirs = VALUE_ALIASES.get(targets.lower())
    near = theirs if theirs in TARGET_WORDS else nearest(targets, TARGET_WORDS, parts=True)
    if near and re.fullmatch(r"[\w-]+", targets):
        reason = f"{quote(targets)} is not one of {', '.join(TARGET_WORDS)}, and not a pattern"
        yield Conflict(("adapter", "targets"), reason, f"Did you mean {near}?")
    yield from bad_pattern(("adapter", "targets"), targets)


@reads("adapter.exclude", "adapter.rank_overrides", "adapter.alpha_overrides")
def patterns_are_readable(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """Every item of `adapter.exclude`, and every key of the overrides, is a name or a regular expression."""
    for index, pattern in enumerate(recipe.adapter.exclude):
        yield from bad_pattern(("adapter", "exclude", index), pattern)
    for key in ("rank_overrides", "alpha_overrides"):
        for pattern in getattr(recipe.adapter, key):
            yield from bad_pattern(("adapter", key, pattern), pattern)


@reads("adapter.layers")
def layers_are_ranges(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """A range in `adapter.layers` ends where it begins, or later."""
    layers = recipe.adapter.layers
    path: PathParts = ("adapter", "layers")
    items = [(path, layers)] if isinstance(layers, str) else []
    if isinstance(layers, list):
        items = [((*path, index), item) for index, item in enumerate(layers) if isinstance(item, str)]
    for where, item in items:
        first, _, last = item.partition("-")
        if item != "all" and int(first) > int(last):
            yield Conflict(where, f"{quote(item)} ends before it begins", f"Write {last}-{first}.")
