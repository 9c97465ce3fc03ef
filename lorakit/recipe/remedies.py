"""What to write instead: for a key that the schema does not know, and for a value that a field does not take."""

from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from lorakit.recipe.describe import default_at, example, words
from lorakit.recipe.foreign import OURS, THEIR_WORDS
from lorakit.recipe.nearest import nearest
from lorakit.recipe.problems import PathParts, dotted, shown
from lorakit.recipe.scalars import resolve
from lorakit.recipe.schema import Recipe
from lorakit.recipe.shape import annotation_at, branches, fields, keys, section_of
from lorakit.recipe.strict_yaml import Node, plain
from lorakit.tables import ADAPTERS, METRICS

_YES = ("yes", "no", "on", "off", "y", "n")


def for_unknown_key(path: PathParts) -> tuple[str, str]:
    """The remedy for an unknown key, and the dotted name of the key that was probably meant (or nothing)."""
    key, prefix = str(path[-1]), dotted(path[:-1])
    section = section_of(annotation_at(Recipe, path[:-1])) or Recipe
    siblings = list(fields(section))
    everywhere = [*keys(Recipe), "extends"]
    if ":" in key:
        return "Put a space behind the colon.", ""
    if path[:-1] == ("adapter", "kind") and key in ADAPTERS:
        return f"{key} has no settings of its own. Write kind: {key}.", ""
    if path[:2] == ("evaluate", "metrics") and len(path) == 4 and key in METRICS:
        return f"{key} has no settings of its own. Write the word alone: {key}.", ""
    folded = key.lower().replace("-", "_").replace(" ", "_")
    if folded in siblings:
        return _did_you_mean(_join(prefix, folded))
    if folded in OURS:
        target, why = OURS[folded]
        return _did_you_mean(target, why)
    elsewhere = [name for name in everywhere if name.rpartition(".")[2] == folded]
    if elsewhere:
        return _did_you_mean(min(elsewhere, key=lambda name: name.count(".")))
    near = nearest(key, siblings)
    if near:
        return _did_you_mean(_join(prefix, near))
    by_last = {name.rpartition(".")[2]: name for name in reversed(everywhere)}
    near = nearest(key, by_last)
    if near:
        return _did_you_mean(by_last[near])
    where = f"The keys of {prefix}" if prefix else "The sections of a recipe"
    return f"{where} are {', '.join(siblings)}.", ""


def _did_you_mean(target: str, why: str = "") -> tuple[str, str]:
    remedy = f"Did you mean {target}?"
    return (f"{remedy} {why}." if why else remedy), target.partition(":")[0]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def for_missing(path: PathParts) -> str:
    """What to write for a key that must be there."""
    name = str(path[-1])
    return f"Write for example {name}: {example(annotation_at(Recipe, path))}."


def for_value(node: Node, path: PathParts) -> str:
    """What to write for a value that the field at `path` does not take."""
    annotation = annotation_at(Recipe, path)
    value = plain(node)
    if isinstance(value, str):
        remedy = _for_text(node, annotation)
    elif isinstance(value, list):
        remedy = f"Write one value, {shown(value[0])}." if len(value) == 1 and accepts(annotation, value[0]) else ""
    elif isinstance(value, dict):
        remedy = ""
    else:
        remedy = _for_number_or_word(node, annotation)
    if remedy:
        return remedy
    if isinstance(value, (str, int, float)) and accepts(annotation, [value]):
        return f"Write it as a list: [{node.text}]."
    default = _default(path)
    usual = f"Write for example {example(annotation, default)}"
    if value is None and default is not PydanticUndefined:
        return f"{usual}, or remove the line for the default."
    return f"{usual}."


def accepts(annotation: Any, value: Any) -> bool:
    """Would this value be right?"""
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _for_text(node: Node, annotation: Any) -> str:
    text = str(node.value).strip()
    for unquoted in (text, text.replace("_", "").replace(",", "")):
        try:
            value = resolve(unquoted)
        except ValueError:
            continue
        if not isinstance(value, str) and value is not None and accepts(annotation, value):
            return f"Remove the quotes: {unquoted}." if unquoted == text else f"Write {unquoted}."
    if text.lower() in _YES and bool in [branch.kind for branch in branches(annotation)]:
        return "Write true or false: YAML 1.2 reads yes, no, on and off as texts."
    known = words(annotation)
    near = THEIR_WORDS.get(text.lower()) if THEIR_WORDS.get(text.lower()) in known else nearest(text, known)
    return f"Did you mean {near}?" if near else ""


def _for_number_or_word(node: Node, annotation: Any) -> str:
    value = node.value
    kinds = [branch.kind for branch in branches(annotation)]
    takes_numbers = int in kinds or float in kinds
    if value is not None and not takes_numbers and accepts(annotation, node.text):
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
