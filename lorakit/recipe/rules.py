"""Combinations that cannot work: rules over several fields, one plain function each.

A rule takes the recipe and the dotted names that the user wrote, and yields what it finds. It runs unless a field that
it reads is itself wrong.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.recipe.data_files import data_files, is_pattern
from lorakit.recipe.format_choice import chosen, format_settings
from lorakit.recipe.nearest import nearest
from lorakit.recipe.paths import is_path
from lorakit.recipe.problems import PathParts, dotted, one_line, shown
from lorakit.recipe.schema import Recipe, Source
from lorakit.tables import FORMATS

UNQUANTIZED_OR_8_BIT = ("none", "q8")
TARGET_WORDS = ("all-linear", "attention", "mlp")


@dataclass(frozen=True)
class Finding:
    """One combination that cannot work, and the key where to say so."""

    path: PathParts
    reason: str
    remedy: str


Rule = Callable[[Recipe, Collection[str]], Iterator[Finding]]
RULES: list[tuple[Rule, tuple[str, ...]]] = []
"""Every rule with the fields that it reads."""


def reads(*fields: str) -> Callable[[Rule], Rule]:
    """Register a rule that reads these fields."""

    def add(rule: Rule) -> Rule:
        RULES.append((rule, fields))
        return rule

    return add


@reads("train.epochs", "train.steps")
def one_length_of_run(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """The run ends after `train.epochs` or `train.steps`: one of them is null."""
    train = recipe.train
    if train.steps is not None and train.epochs is not None and "train.epochs" in written:
        reason = f"the run cannot last both {train.epochs:g} epochs and {train.steps} steps"
        yield Finding(("train", "epochs"), reason, "Remove one of them, or write epochs: null.")
    if train.steps is None and train.epochs is None:
        reason = "the run has no end: epochs and steps are both null"
        yield Finding(("train", "epochs"), reason, "Write for example epochs: 3.")


@reads("train.micro_batch", "train.batch_size")
def micro_batch_fits(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`train.micro_batch` is at most `train.batch_size`."""
    micro, batch = recipe.train.micro_batch, recipe.train.batch_size
    if isinstance(micro, int) and micro > batch:
        reason = f"{micro} rows in memory are more than the {batch} rows of batch_size"
        yield Finding(("train", "micro_batch"), reason, f"Write {batch} or less, or auto.")


@reads("model.double_quant", "model.quantization")
def double_quant_is_4_bit(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`model.double_quant` is written only beside a 4-bit `model.quantization`."""
    quantization = recipe.model.quantization
    if "model.double_quant" in written and quantization in UNQUANTIZED_OR_8_BIT:
        reason = f"it would be ignored, since model.quantization is {quantization}"
        remedy = "Remove the line, or write quantization: nf4."
        yield Finding(("model", "double_quant"), reason, remedy)


@reads("train.early_stopping", "data.eval")
def early_stopping_has_rows(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`train.early_stopping` needs held-out rows: `data.eval`."""
    if recipe.train.early_stopping is not None and recipe.data.eval is None:
        reason = "there are no held-out rows to measure"
        yield Finding(("train", "early_stopping"), reason, "Write data.eval, for example eval: 0.1.")


@reads("evaluate.metrics")
def metrics_are_distinct(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`evaluate.metrics` names each metric once."""
    metrics = recipe.evaluate.metrics
    for index, metric in enumerate(metrics):
        if metric in metrics[:index]:
            yield Finding(("evaluate", "metrics", index), f"{shown(metric)} is there twice", "Remove one.")


@reads("adapter.targets")
def targets_are_readable(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`adapter.targets`, where it is one text, is `all-linear`, `attention`, `mlp` or a regular expression."""
    targets = recipe.adapter.targets
    if not isinstance(targets, str) or targets in TARGET_WORDS:
        return
    near = nearest(targets, TARGET_WORDS)
    if near and re.fullmatch(r"[\w-]+", targets):
        reason = f"{shown(targets)} is none of {', '.join(TARGET_WORDS)}, and no pattern"
        yield Finding(("adapter", "targets"), reason, f"Did you mean {near}?")
    yield from _bad_pattern(("adapter", "targets"), targets)


@reads("adapter.exclude")
def exclude_is_readable(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """Every item of `adapter.exclude` is a name or a regular expression."""
    for index, pattern in enumerate(recipe.adapter.exclude):
        yield from _bad_pattern(("adapter", "exclude", index), pattern)


@reads("data.train")
def sources_are_distinct(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`data.train` names the same rows once."""
    seen: dict[tuple[str, ...], PathParts] = {}
    for path, source in _sources(("data", "train"), recipe.data.train):
        rows = _rows(source)
        shared = min(rows & seen.keys(), default=None)
        if shared:
            reason = f"{_name(source, shared)} is already {dotted(seen[shared])}, and would be trained on twice"
            yield Finding(path, reason, "Remove one of them.")
        seen = {**dict.fromkeys(rows, path), **seen}


@reads("data.train", "data.eval")
def held_out_rows_are_held_out(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`data.eval` names no rows that `data.train` names."""
    if recipe.data.eval is None or isinstance(recipe.data.eval, float):
        return
    sources = _sources(("data", "train"), recipe.data.train)
    trained = {row: path for path, source in sources for row in _rows(source)}
    for path, source in _sources(("data", "eval"), recipe.data.eval):
        shared = min(_rows(source) & trained.keys(), default=None)
        if shared:
            reason = f"{_name(source, shared)} is trained on as {dotted(trained[shared])}"
            remedy = "Write other rows, or a fraction such as eval: 0.1."
            yield Finding(path, reason, remedy)


@reads("data.format")
def format_can_be_read(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`data.format`, where it is a mapping, names one format, and the settings of that format fit each other."""
    yield from _format_mistakes(("data", "format"), recipe.data.format)


@reads("data.train", "data.eval")
def formats_of_sources_can_be_read(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """The `format` of a source, where it is a mapping, does so too."""
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for path, source in _sources(("data", key), sources):
            if isinstance(source, Source) and source.format is not None:
                yield from _format_mistakes((*path, "format"), source.format)


@reads("data.system", "data.format", "data.train", "data.eval")
def system_prompts_are_read(recipe: Recipe, written: Collection[str]) -> Iterator[Finding]:
    """`system`, of the data or of a source, is written only where rows are conversations."""
    read = []
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for path, source in _sources(("data", key), sources):
            if isinstance(source, (str, Source)):
                own = source if isinstance(source, Source) else Source(path=source)
                name = next(iter(chosen(own.format or recipe.data.format)), "auto")
                read.append(name == "auto" or FORMATS[name].facts.get("conversations", True))
                if own.system is not None and not read[-1]:
                    yield Finding((*path, "system"), f"rows of the format {name} have no messages", "Remove it.")
    if recipe.data.system is not None and not any(read):
        yield Finding(("data", "system"), "it would be ignored: no source has conversations", "Remove it.")


def _format_mistakes(path: PathParts, value: Any) -> Iterator[Finding]:
    names = chosen(value)
    if len(names) != 1:
        reason = f"{' and '.join(names)} are {len(names)} formats" if names else "it names no format"
        yield Finding(path, reason, "Write one, such as classification, or with settings {classification: {...}}.")
    elif not isinstance(value, str) and "mistakes" in FORMATS[names[0]].facts:
        for inner, reason, remedy in FORMATS[names[0]].facts["mistakes"](format_settings(value)):
            yield Finding((*path, names[0], *inner), reason, remedy)


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
            return set()  # said where the path is checked
    source = source if isinstance(source, Source) else Source(path=path)
    return {(path, source.split, source.revision)}


def _bad_pattern(path: PathParts, pattern: str) -> Iterator[Finding]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = f"{shown(pattern)} is no regular expression: {error}"
        yield Finding(path, reason, "Correct it, or put a backslash before a character that is meant as it is.")
