"""Combinations that cannot work: rules over several fields, one plain function each.

A rule takes the recipe and the dotted names that the user wrote, and yields what it finds. It runs unless a field that
it reads is itself wrong.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lorakit.amounts import counted
from lorakit.recipe import adapter_rules as adapter_rules
from lorakit.recipe.data_files import data_files, is_pattern
from lorakit.recipe.fields import entry_names
from lorakit.recipe.paths import find_variable, is_path, refuse_variable
from lorakit.recipe.problem import PathParts, dotted_name, one_line, quote
from lorakit.recipe.rule import RULES as RULES
from lorakit.recipe.rule import Conflict, choice_mistakes, reads
from lorakit.recipe.schema import Recipe, Source
from lorakit.recipe.schema_introspection import section_example
from lorakit.registry import FORMATS, METRICS

_FORMAT = "classification, or with settings {classification: {...}}"


@reads("train.epochs", "train.steps")
def one_length_of_run(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """The run ends after `train.epochs` or `train.steps`: one of them is null."""
    train = recipe.train
    if train.steps is not None and train.epochs is not None and "train.epochs" in written:
        reason = f"the run cannot last both {train.epochs:g} epochs and {train.steps} steps"
        yield Conflict(("train", "epochs"), reason, "Remove one of them, or write epochs: null.")
    if train.steps is None and train.epochs is None:
        reason = "the run has no end: epochs and steps are both null"
        yield Conflict(("train", "epochs"), reason, "Write for example epochs: 3.")


@reads("train.warmup", "train.steps")
def warmup_ends(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """A number of steps in `train.warmup` is less than `train.steps`."""
    warmup, steps = recipe.train.warmup, recipe.train.steps
    if isinstance(warmup, int) and steps is not None and 0 < warmup >= steps:
        reason = f"{counted(warmup, 'step')} of warm-up in a run of {steps:,}: the learning rate would never be reached"
        remedy = f"Write less than {steps}, or a fraction such as 0.03." if steps > 1 else "Write 0."
        yield Conflict(("train", "warmup"), reason, remedy)


@reads("train.micro_batch", "train.batch_size")
def micro_batch_fits(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`train.micro_batch` is at most `train.batch_size`."""
    micro, batch = recipe.train.micro_batch, recipe.train.batch_size
    if isinstance(micro, int) and micro > batch:
        reason = f"{micro} rows in memory are more than the {batch} rows of batch_size"
        yield Conflict(("train", "micro_batch"), reason, f"Write {batch} or less, or auto.")


@reads("train.early_stopping", "data.eval")
def early_stopping_has_rows(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`train.early_stopping` needs held-out rows: `data.eval`."""
    if recipe.train.early_stopping is not None and recipe.data.eval is None:
        reason = "there are no held-out rows to measure"
        yield Conflict(("train", "early_stopping"), reason, "Write data.eval, for example eval: 0.1.")


@reads("output.dir")
def output_names_no_variable(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`output.dir` is a path as it stands: no variable of the environment is filled in."""
    variable = find_variable(recipe.output.dir or "")
    if variable and recipe.output.dir and not Path(recipe.output.dir).exists():
        yield Conflict(("output", "dir"), *refuse_variable(recipe.output.dir, variable))


@reads("evaluate.metrics")
def metrics_are_distinct(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`evaluate.metrics` names each metric once."""
    names = [entry_names(metric) for metric in recipe.evaluate.metrics]
    for index, name in enumerate(names):
        if len(name) == 1 and name in names[:index]:
            yield Conflict(("evaluate", "metrics", index), f"{quote(name[0])} is there twice", "Remove one.")


@reads("evaluate.metrics")
def metrics_can_be_read(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """An item of `evaluate.metrics` that is a mapping names one metric; a metric that needs settings has them."""
    for index, metric in enumerate(recipe.evaluate.metrics):
        path = ("evaluate", "metrics", index)
        yield from choice_mistakes(path, METRICS, metric, "exact-match, or with settings {chrf: {word_order: 2}}")
        settings: Any = METRICS[metric].settings if isinstance(metric, str) else None
        needed = [name for name, field in settings.model_fields.items() if field.is_required()] if settings else []
        if needed:
            reason = f"{metric} needs settings: {', '.join(needed)}"
            yield Conflict(path, reason, f"Write for example {{{metric}: {section_example(settings)}}}.")


@reads("data.train")
def sources_are_distinct(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`data.train` names the same rows once."""
    seen: dict[tuple[str, ...], PathParts] = {}
    for path, source in _sources(("data", "train"), recipe.data.train):
        rows = _rows(source)
        shared = min(rows & seen.keys(), default=None)
        if shared:
            reason = f"{_name(source, shared)} is already {dotted_name(seen[shared])}, and would be trained on twice"
            yield Conflict(path, reason, "Remove one of them.")
        seen = {**dict.fromkeys(rows, path), **seen}


@reads("data.train", "data.eval")
def held_out_rows_are_held_out(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`data.eval` names no rows that `data.train` names."""
    if recipe.data.eval is None or isinstance(recipe.data.eval, float):
        return
    sources = _sources(("data", "train"), recipe.data.train)
    trained = {row: path for path, source in sources for row in _rows(source)}
    for path, source in _sources(("data", "eval"), recipe.data.eval):
        shared = min(_rows(source) & trained.keys(), default=None)
        if shared:
            reason = f"{_name(source, shared)} is trained on as {dotted_name(trained[shared])}"
            remedy = "Write other rows, or a fraction such as eval: 0.1."
            yield Conflict(path, reason, remedy)


@reads("data.format")
def format_can_be_read(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`data.format`, where it is a mapping, names one format, and the settings of that format fit each other."""
    yield from choice_mistakes(("data", "format"), FORMATS, recipe.data.format, _FORMAT)


@reads("data.train", "data.eval")
def formats_of_sources_can_be_read(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """The `format` of a source, where it is a mapping, does so too."""
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for path, source in _sources(("data", key), sources):
            if isinstance(source, Source) and source.format is not None:
                yield from choice_mistakes((*path, "format"), FORMATS, source.format, _FORMAT)


@reads("data.system", "data.format", "data.train", "data.eval")
def system_prompts_are_read(recipe: Recipe, written: Collection[str]) -> Iterator[Conflict]:
    """`system`, of the data or of a source, is written only where rows are conversations."""
    read = []
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for path, source in _sources(("data", key), sources):
            if isinstance(source, (str, Source)):
                own = source if isinstance(source, Source) else Source(path=source)
                name = next(iter(entry_names(own.format or recipe.data.format)), "auto")
                read.append(name == "auto" or FORMATS[name].conversations)
                if own.system is not None and not read[-1]:
                    yield Conflict((*path, "system"), f"rows of the format {name} have no messages", "Remove it.")
    if recipe.data.system is not None and not any(read):
        yield Conflict(("data", "system"), "it would be ignored: no source has conversations", "Remove it.")


def _sources(path: PathParts, sources: Any) -> Iterator[tuple[PathParts, str | Source]]:
    if isinstance(sources, list):
        for index, source in enumerate(sources):
            yield (*path, index), source
    else:
        yield path, sources


def _path(source: str | Source) -> str:
    return source if isinstance(source, str) else source.path


def _name(source: str | Source, rows: tuple[str, ...]) -> str:
    """A source, or the file of it that `rows` are in."""
    path = _path(source)
    if not is_path(path):
        return path
    return one_line(os.path.relpath(path if os.path.realpath(path) == rows[0] else rows[0]))


def _rows(source: str | Source) -> set[tuple[str, ...]]:
    """What tells rows apart: each file of a source, or the hub dataset with its split and revision."""
    path = _path(source)
    if is_path(path):
        several = os.path.isdir(path) or is_pattern(path)  # noqa: PTH112
        try:
            return {(os.path.realpath(file),) for file in (data_files(Path(path)) if several else (path,))}
        except OSError:
            return set()  # reported where the path is checked
    source = source if isinstance(source, Source) else Source(path=path)
    return {(path, source.split, source.revision)}
