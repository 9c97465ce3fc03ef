"""What to write instead: for a key that the schema does not know, and for a value that a field does not take."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.key_aliases import KEY_ALIASES, NO_COUNTERPART, OF_A_SOURCE, SWITCHES, VALUE_ALIASES, VALUE_REMEDIES
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
from lorakit.recipe.yaml_reader import Node, other_notation, plain, resolve
from lorakit.registry import FORMATS


def for_unknown_key(path: PathParts, value: Any = None) -> tuple[str, str]:
    """The remedy for an unknown key, and the dotted name of the key that was probably meant (or nothing)."""
    key, outer = str(path[-1]), path[:-1]
    annotation = annotation_at(Recipe, outer)
    siblings = list(fields(section_of(annotation) or Recipe))
    if ":" in key:
        return "Put a space after the colon.", ""
    if not outer and key == "sweep":
        return "This is the file of a sweep: lorakit sweep takes it.", ""
    if not outer and key in keys(Recipe):
        section, _, rest = key.partition(".")
        return f"Write {rest} under {section}. In the file of a sweep, which lorakit sweep takes, it is right.", ""
    if key in words(annotation):
        return f"{key} has no settings. Write the word alone: {key}.", ""
    remedy = _elsewhere(outer, key, siblings, value)
    if not remedy and (near := nearest(key, siblings)):
        return _did_you_mean(dotted_name((*outer, near)))
    if not remedy:
        last_parts = [name.rpartition(".")[2] for name in [*keys(Recipe), "extends"]]
        near = nearest(key, [*last_parts, *KEY_ALIASES, *NO_COUNTERPART])
        remedy = _elsewhere(outer, near, siblings, None) if near else None
    where = f"The keys of {dotted_name(outer)}" if outer else "The sections of a recipe"
    return remedy or (f"{where} are {', '.join(siblings)}.", "")


def _elsewhere(outer: PathParts, key: str, siblings: list[str], value: Any) -> tuple[str, str] | None:
    """A key that is ours in another spelling or another section, or another tool's."""
    folded = key.lower().replace("-", "_").replace(" ", "_")
    inside = tuple(part for part in outer if isinstance(part, str))
    if folded in siblings:
        return _did_you_mean(dotted_name((*outer, folded)))
    if inside in (("data",), ("data", "train"), ("data", "eval")):  # a source of rows, or what holds for all
        if folded in _columns():
            return _did_you_mean(f"data.columns: {{{folded}: NAME}}", "It names the column")
        if OF_A_SOURCE.get(folded) in siblings:
            return _did_you_mean(dotted_name((*inside, OF_A_SOURCE[folded])))
    if not outer and folded == "eval" and isinstance(value, dict):
        return _did_you_mean("evaluate")
    if alias := KEY_ALIASES.get(".".join((*inside[:1], folded))) or KEY_ALIASES.get(folded):
        if ": " in alias[0] and value in (False, None):
            return f"Remove the line: this is off unless {alias[0]} is written.", ""
        return _did_you_mean(*alias)
    if folded in NO_COUNTERPART:
        return f"lorakit has nothing for it: {NO_COUNTERPART[folded]}. Remove the line.", ""
    elsewhere = [name for name in [*keys(Recipe), "extends"] if name.rpartition(".")[2] == folded]
    if inside[:1] != ("data",):  # a key of one source is not what another section means
        elsewhere = [name for name in elsewhere if not name.startswith(("data.train.", "data.eval."))]
    return _did_you_mean(min(elsewhere, key=lambda name: name.count("."))) if elsewhere else None


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
    return f"Write for example {path[-1]}: {example(annotation_at(Recipe, path))}."


def for_value(node: Node, path: PathParts) -> str:
    """What to write for a value that the field at `path` does not take."""
    annotation, value = annotation_at(Recipe, path), plain(node)
    key = dotted_name(tuple(part for part in path if isinstance(part, str)))
    if remedy := VALUE_REMEDIES.get((key, node.text.lower())):
        return remedy
    for remedy, candidate in _candidates(node, annotation):
        if accepts(annotation, candidate):
            return remedy
    section, name = section_of(annotation_at(Recipe, path[:-1])), str(*path[-1:])
    default = default_at(section, name) if section and name in section.model_fields else PydanticUndefined
    usual = f"Write for example {example(annotation, default)}"
    if value is None and default is not PydanticUndefined:
        return f"{usual}, or remove the line for the default."
    return f"{usual}."


def _candidates(node: Node, annotation: Any) -> Iterator[tuple[str, Any]]:
    """What may have been meant by a value, each as a remedy and as the value that it says to write."""
    value, shown, known = plain(node), one_line(node.text), words(annotation)
    if value is None or isinstance(value, dict):
        return
    if isinstance(value, str):
        yield from _meant_by_text(value.strip(), known)
    elif isinstance(value, bool):
        yield from ((f"Write {word}.", word) for word in SWITCHES[value] if word in known)
        return
    elif isinstance(value, list):
        yield from ((f"Write one value, {quote(only)}.", only) for only in value[:1] if len(value) == 1)
        return
    else:
        if (word := VALUE_ALIASES.get(node.text)) in known:
            yield f"Did you mean {word}?", word
        kinds = {branch.kind for branch in alternatives_of(annotation)}
        if not kinds & {int, float}:
            yield f"Put quotes around it: '{shown}'.", node.text
        if float not in kinds and value == int(value):
            yield f"Write {int(value)}.", int(value)
    section = section_of(annotation)
    for name in ("base", "train", "kind", "dir"):
        if section and name in section.model_fields:
            yield f"Write {{{name}: {shown}}}.", {name: value}
    yield f"Write it as a list: [{shown}].", [value]
    items = next((branch.of for branch in alternatives_of(annotation) if branch.kind is list), None)
    if items is not None and (near := nearest_word(str(value), words(items))):
        yield f"Write a list: [{near}].", [near]


def _meant_by_text(text: str, known: Sequence[str]) -> Iterator[tuple[str, Any]]:
    unquoted = _resolved(text)
    if not isinstance(unquoted, str) and unquoted is not None:
        yield f"Remove the quotes: {text}.", unquoted
    if number := other_notation(text):
        yield f"Write {number}.", _resolved(number)
    switch = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}.get(text.lower(), unquoted)
    if isinstance(switch, bool):
        yield f"Write {str(switch).lower()}: YAML 1.2 reads yes, no, on and off as texts.", switch
        yield from ((f"Write {word}.", word) for word in SWITCHES[switch] if word in known)
    elif near := nearest_word(text, known):
        yield f"Did you mean {near}?", near


def nearest_word(text: str, known: Sequence[str]) -> str | None:
    """The one of our words that another tool calls so, or that is spelt like it."""
    word = VALUE_ALIASES.get(text.lower())
    return word if word in known else nearest(text, known, parts=True)


def _resolved(text: str) -> Any:
    try:
        return resolve(text)
    except ValueError:
        return text
