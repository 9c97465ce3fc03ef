"""Combinations that cannot work: rules over several fields, one plain function each.

A rule takes the recipe and the dotted names that the user wrote, and yields the key of each conflict, the reason and
the remedy. It runs unless a field that it reads is itself wrong.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from lorakit.amounts import counted
from lorakit.recipe.adapter_kind import adapter_spec, initial_adapter, trains_all, unread_keys
from lorakit.recipe.data_files import data_files, is_pattern
from lorakit.recipe.export_target import ExportTarget, parse_target
from lorakit.recipe.fields import entry_names, entry_settings
from lorakit.recipe.init_adapter import read_adapter_settings, why_untrainable
from lorakit.recipe.paths import find_variable, is_path, refuse_variable
from lorakit.recipe.problem import PathParts, dotted_name, one_line, quote, show_path
from lorakit.recipe.schema import Recipe, Source
from lorakit.recipe.schema_introspection import section_example
from lorakit.recipe.sharding import sharding_conflicts
from lorakit.recipe.suggestions import nearest_word
from lorakit.registry import ADAPTERS, FORMATS, METRICS, TRACKERS, AnyTable

Conflicts = Iterator[tuple[PathParts, str, str]]
Written = Collection[str]
Rule = Callable[[Recipe, Written], Conflicts]
RULES: list[tuple[Rule, tuple[str, ...]]] = []
"""Every rule with the fields that it reads."""

_TARGET_WORDS = ("all-linear", "attention", "mlp")


def reads(*fields: str) -> Callable[[Rule], Rule]:
    """Register a rule that reads these fields."""

    def add(rule: Rule) -> Rule:
        RULES.append((rule, fields))
        return rule

    return add


@reads("adapter.kind", "adapter.rank")
def kind_can_be_read(recipe: Recipe, written: Written) -> Conflicts:
    """`adapter.kind`, where it is a mapping, names one kind, and the settings of that kind fit each other."""
    example, adapter = "lora, or {pissa: {iterations: 4}}", recipe.adapter
    yield from _choice_conflicts(("adapter", "kind"), ADAPTERS, adapter.kind, example, adapter)


@reads("evaluate.baselines")
def system_text_is_written_once(recipe: Recipe, written: Written) -> Conflicts:
    """`evaluate.baselines` has a `system` text or a `system_file`."""
    if recipe.evaluate.baselines.system is not None and recipe.evaluate.baselines.system_file is not None:
        reason = "system is there too, and they say one thing"
        yield ("evaluate", "baselines", "system_file"), reason, "Leave one of the two out."


@reads("adapter", "model.quantization", "model.double_quant", "train")
def keys_are_read(recipe: Recipe, written: Written) -> Conflicts:
    """A key that nothing would read, such as `model.double_quant` without 4 bits, is not written."""
    source = initial_adapter(recipe.adapter)
    known = read_adapter_settings(Path(source)) if source else {}
    values = recipe.model_dump()
    for name, reason in unread_keys(recipe).items():
        section, key = name.split(".")
        value = values[section][key]
        if source and section == "adapter":
            if not known or known.get(key) == value:
                continue  # nothing is there, which another rule says; or a recipe goes on with its own adapter
            if key in known:
                reason = f"the adapter of {show_path(Path(source))} has {key} {quote(known[key])}"
        if name in written and value not in (None, {}, []):
            other = ", or write quantization: nf4" if name == "model.double_quant" else ""
            yield (section, key), reason, f"Remove the line{other}."


@reads("adapter.kind", "model.quantization")
def kind_goes_with_quantization(recipe: Recipe, written: Written) -> Conflicts:
    """`adapter.kind` loftq and none take the base unquantized."""
    kind, quantization = adapter_spec(recipe.adapter), recipe.model.quantization
    if kind.quantizations is not None and quantization not in kind.quantizations:
        reason = f"{quantization} weights cannot be trained themselves, as adapter.kind {kind.name} does"
        if kind.quantizes:
            reason = f"{kind.name} begins with the full-precision weights, and quantizes them to {kind.quantizes}"
        remedy = f"Write quantization: none, or another adapter.kind, such as lora with {quantization}."
        yield ("model", "quantization"), reason, remedy


@reads("adapter.kind", "train.optimizer")
def kind_goes_with_optimizer(recipe: Recipe, written: Written) -> Conflicts:
    """`adapter.kind` flexlora, whose matrices change their shapes, trains with adamw alone."""
    kind, optimizer = adapter_spec(recipe.adapter), recipe.train.optimizer
    if kind.optimizers is not None and optimizer not in kind.optimizers:
        reason = f"{kind.name} changes the shapes of its matrices, and {optimizer} cannot change its states with them"
        yield ("train", "optimizer"), reason, "Write optimizer: adamw."


@reads("train.sharding", "model.quantization", "adapter.kind", "train.optimizer", "model.dtype")
def sharding_goes_with_the_rest(recipe: Recipe, written: Written) -> Conflicts:
    """`train.sharding` goes with the numbers of the model, the kind of adapter and the optimizer."""
    yield from sharding_conflicts(recipe, recipe.train.sharding)


@reads("adapter.from", "output.dir")
def adapter_can_be_trained_on(recipe: Recipe, written: Written) -> Conflicts:
    """`adapter.from` names a LoRA or DoRA adapter: of an ended run, of a checkpoint, or one that PEFT saved."""
    folder = initial_adapter(recipe.adapter)
    if folder is None or not Path(folder).is_dir():  # reported where the path is checked
        return
    if refused := why_untrainable(Path(folder)):
        yield ("adapter", "from"), *refused
    elif recipe.output.dir and Path(folder).resolve() == Path(recipe.output.dir).resolve():
        yield ("adapter", "from"), "it is the folder that this run writes to", "Write another output.dir."


@reads("adapter.kind", "output.merged")
def merged_has_an_adapter(recipe: Recipe, written: Written) -> Conflicts:
    """`output.merged` needs an adapter: `adapter.kind` none has none to merge."""
    if recipe.output.merged and trains_all(recipe.adapter):
        reason = "there is no adapter to merge: adapter.kind none trains the weights themselves"
        yield ("output", "merged"), reason, "Remove the line; the run's model/ is the trained model."


@reads("output.export", "adapter.kind")
def exports_are_targets(recipe: Recipe, written: Written) -> Conflicts:
    """`output.export` names each target of `lorakit export` once; `adapter.kind` none has no adapter for one."""
    seen: list[ExportTarget] = []
    for path, word in _items(("output", "export"), recipe.output.export):
        try:
            target = parse_target(word)
        except ValueError as error:
            reason, _, remedy = str(error).partition(". ")
            yield path, reason, remedy
            continue
        if target in seen:
            yield path, f"{quote(word)} is there twice", "Remove one."
        elif target.is_adapter and trains_all(recipe.adapter):
            reason = f"{target} is made from an adapter, and adapter.kind none trains the weights themselves"
            yield path, reason, "Remove it."
        seen.append(target)


@reads("adapter.targets")
def targets_are_readable(recipe: Recipe, written: Written) -> Conflicts:
    """`adapter.targets` is one of `all-linear`, `attention` and `mlp`, or a regular expression, or a list of names."""
    targets, path = recipe.adapter.targets, ("adapter", "targets")
    if isinstance(targets, list):
        for index, name in enumerate(targets):
            if name in _TARGET_WORDS:
                reason = f"{quote(name)} stands for many modules and is not a module's name"
                yield (*path, index), reason, f"Write {'module names' if targets[1:] else f'targets: {name}'}."
    elif targets not in _TARGET_WORDS:
        names = [name.strip() for name in targets.split(",")]
        near = nearest_word(targets, _TARGET_WORDS)
        if len(names) > 1 and all(re.fullmatch(r"[\w.-]+", name) for name in names):
            yield path, f"{quote(targets)} is one text, not a list of names", f"Write [{', '.join(names)}]."
        elif near and re.fullmatch(r"[\w-]+", targets):
            reason = f"{quote(targets)} is not one of {', '.join(_TARGET_WORDS)}, and not a pattern"
            yield path, reason, f"Did you mean {near}?"
        yield from _pattern_conflicts(path, targets)


@reads("adapter.exclude", "adapter.rank_overrides", "adapter.alpha_overrides")
def patterns_are_readable(recipe: Recipe, written: Written) -> Conflicts:
    """Every item of `adapter.exclude`, and every key of the overrides, is a name or a regular expression."""
    for index, pattern in enumerate(recipe.adapter.exclude):
        yield from _pattern_conflicts(("adapter", "exclude", index), pattern)
    for key in ("rank_overrides", "alpha_overrides"):
        for pattern in getattr(recipe.adapter, key):
            yield from _pattern_conflicts(("adapter", key, pattern), pattern)


@reads("adapter.layers")
def layers_are_ranges(recipe: Recipe, written: Written) -> Conflicts:
    """A range in `adapter.layers` ends where it begins, or later."""
    for path, item in _items(("adapter", "layers"), recipe.adapter.layers):
        if isinstance(item, str) and item != "all":
            first, _, last = item.partition("-")
            if int(first) > int(last):
                yield path, f"{quote(item)} ends before it begins", f"Write {last}-{first}."


@reads("train.epochs", "train.steps")
def one_length_of_run(recipe: Recipe, written: Written) -> Conflicts:
    """The run ends after `train.epochs` or `train.steps`: one of them is null."""
    train = recipe.train
    if train.steps is not None and train.epochs is not None and "train.epochs" in written:
        reason = f"the run cannot last both {train.epochs:g} epochs and {train.steps} steps"
        yield ("train", "epochs"), reason, "Remove one of them, or write epochs: null."
    if train.steps is None and train.epochs is None:
        reason = "the run has no end: epochs and steps are both null"
        yield ("train", "epochs"), reason, "Write for example epochs: 3."


@reads("train.warmup", "train.steps")
def warmup_ends(recipe: Recipe, written: Written) -> Conflicts:
    """A number of steps in `train.warmup` is less than `train.steps`."""
    warmup, steps = recipe.train.warmup, recipe.train.steps
    if isinstance(warmup, int) and steps is not None and 0 < warmup >= steps:
        reason = f"{counted(warmup, 'step')} of warm-up in a run of {steps:,}: the learning rate would never be reached"
        remedy = f"Write less than {steps}, or a fraction such as 0.03." if steps > 1 else "Write 0."
        yield ("train", "warmup"), reason, remedy


@reads("train.micro_batch", "train.batch_size", "train.batch_tokens")
def micro_batch_fits(recipe: Recipe, written: Written) -> Conflicts:
    """`train.micro_batch` is at most `train.batch_size`."""
    micro, batch = recipe.train.micro_batch, recipe.train.batch_size
    if isinstance(micro, int) and micro > batch and recipe.train.batch_tokens is None:
        reason = f"{micro} rows in memory are more than the {batch} rows of batch_size"
        yield ("train", "micro_batch"), reason, f"Write {batch} or less, or auto."


@reads("train.early_stopping", "data.eval")
def early_stopping_has_rows(recipe: Recipe, written: Written) -> Conflicts:
    """`train.early_stopping` needs held-out rows: `data.eval`."""
    if recipe.train.early_stopping is not None and recipe.data.eval is None:
        reason = "there are no held-out rows to measure"
        yield ("train", "early_stopping"), reason, "Write data.eval, for example eval: 0.1."


@reads("evaluate.samples", "data.eval")
def samples_have_rows(recipe: Recipe, written: Written) -> Conflicts:
    """`evaluate.samples` needs held-out rows: `data.eval`."""
    if recipe.evaluate.samples and recipe.data.eval is None:
        reason = "there are no held-out rows to answer"
        yield ("evaluate", "samples"), reason, "Write data.eval, for example eval: 0.1, or samples: 0."


@reads("model.add_tokens")
def added_tokens_are_texts(recipe: Recipe, written: Written) -> Conflicts:
    """`model.add_tokens` has each text once, and none of white space alone."""
    path, tokens = ("model", "add_tokens"), recipe.model.add_tokens
    for index, token in enumerate(tokens):
        if not token.strip():
            yield (*path, index), f"{quote(token)} is white space alone", "Write a text."
        elif token in tokens[:index]:
            yield (*path, index), f"{quote(token)} is there twice", "Remove one."


@reads("model.add_tokens", "adapter")
def added_tokens_are_trained(recipe: Recipe, written: Written) -> Conflicts:
    """`model.add_tokens` goes with `adapter.kind` none where all weights are trained, the embeddings too."""
    adapter = recipe.adapter
    narrowed = adapter.targets != "all-linear" or adapter.exclude or adapter.layers != "all"
    if recipe.model.add_tokens and trains_all(adapter) and narrowed:
        reason = "adapter.kind none trains the chosen modules alone here, and no row of the embeddings"
        yield ("model", "add_tokens"), reason, "Train all modules, or write another adapter.kind, such as lora."


@reads("output.dir")
def output_names_no_variable(recipe: Recipe, written: Written) -> Conflicts:
    """`output.dir` is a path as it stands: no variable of the environment is filled in."""
    folder = recipe.output.dir or ""
    if (variable := find_variable(folder)) and not Path(folder).exists():
        yield ("output", "dir"), *refuse_variable(folder, variable)


@reads("evaluate.metrics")
def metrics_can_be_read(recipe: Recipe, written: Written) -> Conflicts:
    """`evaluate.metrics` names each metric once; a mapping names one, and a metric that needs settings has them."""
    seen: set[str] = set()
    for path, metric in _items(("evaluate", "metrics"), recipe.evaluate.metrics):
        yield from _choice_conflicts(path, METRICS, metric, "exact-match, or with settings {chrf: {word_order: 2}}")
        settings: Any = METRICS[metric].settings if isinstance(metric, str) else None
        needed = [name for name, field in settings.model_fields.items() if field.is_required()] if settings else []
        if needed:
            reason = f"{metric} needs settings: {', '.join(needed)}"
            yield path, reason, f"Write for example {{{metric}: {section_example(settings)}}}."
        name, *others = entry_names(metric) or [""]
        if name in seen and not others:
            yield path, f"{quote(name)} is there twice", "Remove one."
        seen.add(name)


@reads("track")
def trackers_can_be_read(recipe: Recipe, written: Written) -> Conflicts:
    """`track` names each tracker once; a mapping names one."""
    seen: set[str] = set()
    for path, tracker in _items(("track",), recipe.track):
        yield from _choice_conflicts(path, TRACKERS, tracker, "tensorboard, or with settings {wandb: {mode: offline}}")
        name, *others = entry_names(tracker) or [""]
        if name in seen and not others:
            yield path, f"{quote(name)} is there twice", "Remove one."
        seen.add(name)


@reads("data.train", "data.eval", "data.clean")
def sources_are_distinct(recipe: Recipe, written: Written) -> Conflicts:
    """`data.train` names the same rows once, and `data.eval` none of them, unless it takes some of them (`take`) that \
`data.clean.leakage: fix` leaves out of the training."""
    trained: dict[tuple[str, ...], PathParts] = {}
    for path, source in _sources(recipe):
        rows, is_trained = _rows(source), path[1] == "train"
        takes = isinstance(source, Source) and source.take is not None
        if not is_trained and takes and recipe.data.clean.leakage == "fix":
            continue
        if shared := min(rows & trained.keys(), default=None):
            name, first = _name(source, shared), dotted_name(trained[shared])
            reason = f"{name} is already {first}, and would be trained on twice"
            remedy = "Remove one of them."
            if not is_trained:
                reason = f"{name} is trained on as {first}"
                remedy = "Write other rows, or a fraction such as eval: 0.1."
                if takes:
                    remedy = "Write other rows, or clean: {leakage: fix}, which trains on none of those that it takes."
            yield path, reason, remedy
        trained = {**(dict.fromkeys(rows, path) if is_trained else {}), **trained}


@reads("data.train", "data.eval")
def hub_keys_are_read(recipe: Recipe, written: Written) -> Conflicts:
    """`subset` and `data_files` are written for a hub dataset alone."""
    for path, source in _sources(recipe):
        if isinstance(source, Source) and is_path(source.path):
            for key in ("subset", "data_files"):
                if getattr(source, key) is not None:
                    yield (
                        (*path, key),
                        "it would be ignored: path is a file, a folder or a pattern",
                        "Remove it, or name the file by path.",
                    )


@reads("data.format", "data.train", "data.eval")
def formats_can_be_read(recipe: Recipe, written: Written) -> Conflicts:
    """A `format` that is a mapping, of the data or of a source, names one format, and its settings fit each other."""
    formats: dict[PathParts, Any] = {("data", "format"): recipe.data.format}
    formats |= {(*path, "format"): source.format for path, source in _sources(recipe) if isinstance(source, Source)}
    for path, value in formats.items():
        yield from format_conflicts(path, value) if value is not None else ()


def format_conflicts(path: PathParts, value: Any) -> Conflicts:
    """What is wrong with the value of a `format` at `path`, beyond what the schema says."""
    yield from _choice_conflicts(path, FORMATS, value, "classification, or with settings {classification: {...}}")


@reads("data.system", "data.format", "data.train", "data.eval")
def system_prompts_are_read(recipe: Recipe, written: Written) -> Conflicts:
    """`system`, of the data or of a source, is written only where rows are conversations."""
    read = []
    for path, source in _sources(recipe):
        own = source if isinstance(source, Source) else Source(path=source)
        name = next(iter(entry_names(own.format or recipe.data.format)), "auto")
        read.append(name == "auto" or FORMATS[name].conversations)
        if own.system is not None and not read[-1]:
            yield (*path, "system"), f"rows of the format {name} have no messages", "Remove it."
    if recipe.data.system is not None and not any(read):
        yield ("data", "system"), "it would be ignored: no source has conversations", "Remove it."


def _pattern_conflicts(path: PathParts, pattern: str) -> Conflicts:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = f"{quote(pattern)} is not a regular expression: {error}"
        yield path, reason, "Correct it, or put a backslash before a character that is meant as it is."


def _choice_conflicts(path: PathParts, table: AnyTable, value: Any, example: str, *beside: Any) -> Conflicts:
    """A mapping that names no entry of a table, or several, and settings of an entry that do not fit each other.

    `beside` is what the table's entries are given beside their settings.
    """
    names = entry_names(value)
    if len(names) != 1:
        nouns = f"{table.noun}s"
        reason = f"{' and '.join(names)} are {len(names)} {nouns}" if names else f"it names no {table.noun}"
        yield path, reason, f"Write one, such as {example}."
    elif not isinstance(value, str) and (mistakes := table[names[0]].mistakes):
        for inner, reason, remedy in mistakes(entry_settings(table, value), *beside):
            yield (*path, names[0], *inner), reason, remedy
    elif isinstance(value, str) and value in table and (needs := table[value].needs_settings):
        yield path, f"{value} needs settings", f"Write for example {needs}."


def _items(path: PathParts, value: Any) -> Iterator[tuple[PathParts, Any]]:
    """A value, or each item of a list, with its path."""
    yield from (
        [((*path, index), item) for index, item in enumerate(value)] if isinstance(value, list) else [(path, value)]
    )


def _sources(recipe: Recipe) -> Iterator[tuple[PathParts, str | Source]]:
    """Every source that is trained on or held out; a fraction is none."""
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        yield from (pair for pair in _items(("data", key), sources) if isinstance(pair[1], str | Source))


def _name(source: str | Source, rows: tuple[str, ...]) -> str:
    """A source, or the file of it that `rows` are in."""
    path = source if isinstance(source, str) else source.path
    return one_line(os.path.relpath(path if os.path.realpath(path) == rows[0] else rows[0])) if is_path(path) else path


def _rows(source: str | Source) -> set[tuple[str, ...]]:
    """What tells rows apart: each file of a source, or the hub dataset with what names its rows there."""
    source = source if isinstance(source, Source) else Source(path=source)
    path = source.path
    if not is_path(path):
        return {(path, str(source.subset), str(source.data_files), source.split, source.revision)}
    several = os.path.isdir(path) or is_pattern(path)  # noqa: PTH112
    try:
        return {(os.path.realpath(file),) for file in (data_files(Path(path)) if several else (path,))}
    except OSError:
        return set()  # reported where the path is checked
