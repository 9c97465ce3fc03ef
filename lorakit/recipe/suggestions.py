"""What to write instead: for a key that the schema does not know, and for a value that a field does not take."""

import functools
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.key_aliases import KEY_ALIASES, NO_COUNTERPART, SWITCHES, VALUE_ALIASES, VALUE_REMEDIES
from lorakit.recipe.problem import PathParts, dotted_name, one_line, quote
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import (
    accepts,
    alternatives_of,
    annotation_at,
    default_at,
    example,
    fields,
    keys,
    section_of,
    words,
)
from lorakit.recipe.yaml_reader import Node, plain
from lorakit.recipe.yaml_scalars import other_notations, resolve
from lorakit.registry import ADAPTERS, FORMATS, METRICS

_OF_A_SOURCE = {
    "type": "format",
    "dataset_type": "format",
    "name": "path",
    "dataset": "path",
    "data_files": "path",
    "file": "path",
    "samples": "take",
    "num_samples": "take",
    "max_samples": "take",
    "prob": "weight",
    "probability": "weight",
}
"""Their key of a source of rows -> ours."""
_IN_A_SECTION = {
    "output.path": ("output.dir", ""),
    "output.folder": ("output.dir", ""),
    "evaluate.limit": ("evaluate.rows", ""),
    "evaluate.num_samples": ("evaluate.rows", ""),
    "evaluate.max_tokens": ("evaluate.max_new_tokens", ""),
    "evaluate.tasks": ("evaluate.metrics", "Benchmarks are a command: lorakit benchmark"),
    "evaluate.benchmarks": ("evaluate.metrics", "Benchmarks are a command: lorakit benchmark"),
}
"""Their key of a section -> ours, and why."""
_YES = ("yes", "no", "on", "off", "y", "n")


def for_unknown_key(path: PathParts, value: Any = None) -> tuple[str, str]:
    """The remedy for an unknown key, and the dotted name of the key that was probably meant (or nothing)."""
    key, prefix = str(path[-1]), dotted_name(path[:-1])
    siblings = list(fields(section_of(annotation_at(Recipe, path[:-1])) or Recipe))
    if ":" in key:
        return "Put a space after the colon.", ""
    if path[:-1] == ("adapter", "kind") and key in ADAPTERS:
        return f"{key} has no settings. Write kind: {key}.", ""
    if path[:2] == ("evaluate", "metrics") and len(path) == 4 and key in METRICS:
        return f"{key} has no settings. Write the word alone: {key}.", ""
    folded = key.lower().replace("-", "_").replace(" ", "_")
    if folded in siblings:
        return _did_you_mean(dotted_name((*path[:-1], folded)))
    remedy = _elsewhere(path, folded, siblings, value) or _misspelt(path, key, siblings)
    if remedy:
        return remedy
    where = f"The keys of {prefix}" if prefix else "The sections of a recipe"
    return f"{where} are {', '.join(siblings)}.", ""


def _elsewhere(path: PathParts, folded: str, siblings: list[str], value: Any) -> tuple[str, str] | None:
    """A key of another tool, or of ours that belongs into another section."""
    if _is_a_source(path[:-1]) and folded in _columns():
        return _did_you_mean(f"data.columns: {{{folded}: NAME}}", "It names the column")
    if _is_a_source(path[:-1]) and _OF_A_SOURCE.get(folded) in siblings:
        inside = tuple(part for part in path[:-1] if isinstance(part, str))
        return _did_you_mean(dotted_name((*inside, _OF_A_SOURCE[folded])))
    if path == ("eval",) and isinstance(value, dict):
        return _did_you_mean("evaluate")
    if dotted_name((*path[:-1], folded)) in _IN_A_SECTION:
        return _did_you_mean(*_IN_A_SECTION[dotted_name((*path[:-1], folded))])
    in_adapter = {"type": "adapter.kind", "method": "adapter.kind", "name": "adapter.kind", "path": "adapter.from"}
    if path[0] == "adapter" and folded in in_adapter:
        return _did_you_mean(in_adapter[folded])
    if path[0] == "model" and folded in ("name", "path", "id"):
        return _did_you_mean("model.base")
    if folded in KEY_ALIASES:
        target, why = KEY_ALIASES[folded]
        if ": " in target and value in (False, None):
            return f"Remove the line: this is off unless {target} is written.", ""
        return _did_you_mean(target, why)
    if folded in NO_COUNTERPART:
        return f"lorakit has nothing for it: {NO_COUNTERPART[folded]}. Remove the line.", ""
    elsewhere = [name for name in [*keys(Recipe), "extends"] if name.rpartition(".")[2] == folded]
    if path[0] != "data":  # a key of one source is not what another section means
        elsewhere = [name for name in elsewhere if not name.startswith(("data.train.", "data.eval."))]
    return _did_you_mean(min(elsewhere, key=lambda name: name.count("."))) if elsewhere else None


def _misspelt(path: PathParts, key: str, siblings: list[str]) -> tuple[str, str] | None:
    near = nearest(key, siblings)
    if near:
        return _did_you_mean(dotted_name((*path[:-1], near)))
    by_last = {name.rpartition(".")[2]: name for name in reversed([*keys(Recipe), "extends"])}
    near = nearest(key, [*by_last, *KEY_ALIASES, *NO_COUNTERPART])
    if near in by_last:
        return _did_you_mean(by_last[near])
    return _elsewhere(path, near, siblings, None) if near else None


def _is_a_source(path: PathParts) -> bool:
    """Is this `data`, or one of its sources?"""
    return path[:1] == ("data",) and all(part in ("train", "eval") or isinstance(part, int) for part in path[1:])


@functools.cache
def _columns() -> frozenset[str]:
    """Every name of ours for a column."""
    named = [name for entry in FORMATS for name in (*entry.columns, *entry.optional)]
    return frozenset(one for name in named for one in ([name] if isinstance(name, str) else name))


def _did_you_mean(target: str, why: str = "") -> tuple[str, str]:
    remedy = f"Did you mean {target}?"
    return (f"{remedy} {why}." if why else remedy), target.partition(":")[0]


def for_missing(path: PathParts) -> str:
    """What to write for a key that must be there."""
    name = str(path[-1])
    return f"Write for example {name}: {example(annotation_at(Recipe, path))}."


def for_value(node: Node, path: PathParts) -> str:
    """What to write for a value that the field at `path` does not take."""
    annotation = annotation_at(Recipe, path)
    value = plain(node)
    key = dotted_name(tuple(part for part in path if isinstance(part, str)))
    remedy = VALUE_REMEDIES.get((key, str(node.text if node.value is not None else "null").lower()), "")
    if remedy:
        return remedy
    if isinstance(value, str):
        remedy = _for_text(node, annotation)
    elif isinstance(value, list):
        remedy = f"Write one value, {quote(value[0])}." if len(value) == 1 and accepts(annotation, value[0]) else ""
    elif isinstance(value, bool):
        remedy = _for_switch(value, annotation)
    elif not isinstance(value, dict):
        remedy = _for_number_or_word(node, annotation)
    remedy = remedy or _in_a_section(node, annotation)
    if remedy:
        return remedy
    if isinstance(value, (str, int, float)) and accepts(annotation, [value]):
        return f"Write it as a list: [{node.text}]." if _can_be_shown(node.text) else "Write a list of one."
    items = next((branch.of for branch in alternatives_of(annotation) if branch.kind is list), None)
    near = _near_word(str(value), words(items)) if items is not None and isinstance(value, str) else None
    if near:
        return f"Write a list: [{near}]."
    default = _default(path)
    usual = f"Write for example {example(annotation, default)}"
    if value is None and default is not PydanticUndefined:
        return f"{usual}, or remove the line for the default."
    return f"{usual}."


def _for_switch(value: bool, annotation: Any) -> str:
    """true or false where a word stands for it."""
    known = words(annotation)
    return next((f"Write {word}." for word in SWITCHES[value] if word in known), "")


def _in_a_section(node: Node, annotation: Any) -> str:
    """A value alone where a mapping is wanted that has a key for it."""
    section = section_of(annotation)
    if section is None or isinstance(plain(node), (dict, bool)) or node.value is None:
        return ""
    for name in ("base", "train", "kind", "dir"):
        if name in section.model_fields and accepts(fields(section)[name], plain(node)):
            return f"Write {{{name}: {node.text}}}." if _can_be_shown(node.text) else f"Write a mapping with {name}."
    return ""


def _can_be_shown(text: str) -> bool:
    """Whether a remedy can hold a text as it is: short, on one line, and nothing in it that commands a terminal."""
    return one_line(text) == text


def _for_text(node: Node, annotation: Any) -> str:
    text = str(node.value).strip()
    number = _number_in(text, annotation)
    if number:
        return number
    known = words(annotation)
    means_true = text.lower() in ("yes", "on", "y", "true")
    if text.lower() in _YES and bool in [branch.kind for branch in alternatives_of(annotation)]:
        return f"Write {str(means_true).lower()}: YAML 1.2 reads yes, no, on and off as texts."
    if text.lower() in (*_YES, "true", "false"):
        return _for_switch(means_true, annotation)
    near = _near_word(text, known)
    return f"Did you mean {near}?" if near else ""


def _near_word(text: str, known: Sequence[str]) -> str | None:
    """The one of our words that another tool calls so, or that is spelt like it."""
    theirs = VALUE_ALIASES.get(text.lower())
    return theirs if theirs in known else nearest(text, known, parts=True)


def _number_in(text: str, annotation: Any) -> str:
    """A number, or true or false, in quotes, with signs between its digits, or as per cent; nothing where none fits."""
    value = _resolved(text)
    if not isinstance(value, str) and value is not None and accepts(annotation, value):
        return f"Remove the quotes: {text}."
    for meant in other_notations(text):
        if accepts(annotation, _resolved(meant)):
            return f"Write {meant}."
    return ""


def _resolved(text: str) -> Any:
    try:
        return resolve(text)
    except ValueError:
        return text


def _for_number_or_word(node: Node, annotation: Any) -> str:
    value = node.value
    theirs = VALUE_ALIASES.get(str(node.text))
    if value is not None and theirs in words(annotation):
        return f"Did you mean {theirs}?"
    kinds = [branch.kind for branch in alternatives_of(annotation)]
    takes_numbers = int in kinds or float in kinds
    if value is not None and not takes_numbers and accepts(annotation, node.text) and _can_be_shown(node.text):
        return f"Put quotes around it: '{node.text}'."
    if isinstance(value, float) and value.is_integer() and float not in kinds and accepts(annotation, int(value)):
        return f"Write {int(value)}."
    return ""


def _default(path: PathParts) -> Any:
    """The default of the key at `path`; PydanticUndefined for items, and where there is none."""
    section: type[BaseModel] | None = section_of(annotation_at(Recipe, path[:-1])) if path else None
    name = path[-1] if path else ""
    if section is None or not isinstance(name, str) or name not in section.model_fields:
        return PydanticUndefined
    return default_at(section, name)
