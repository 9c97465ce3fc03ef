"""The recipe's annotations as plain data: which values a field takes, in words, and which annotation is at a path.

Errors, the reference and the JSON schema say what a field accepts in the same words.
"""

import functools
import json
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorakit.recipe.fields import PathRole, Wording, WordOf
from lorakit.recipe.problem import PathParts

Note = TypeVar("Note")


@dataclass(frozen=True)
class Alternative:
    """One kind of value that a field takes.

    `kind` is int, float, bool, str, NoneType, Literal, list, dict or a section; `of` the words of a Literal or the
    annotation of a list's items or a dict's values; `notes` the annotations that apply, numbers' bounds among them.
    """

    kind: Any
    of: Any = None
    notes: tuple[Any, ...] = ()

    def note(self, kind: type[Note]) -> Note | None:
        """The annotation of this type, if there is one."""
        return next((note for note in self.notes if isinstance(note, kind)), None)

    def bound(self, name: str) -> Any:
        """A constraint such as `gt` or `min_length`; None where there is none."""
        values = (getattr(note, name, None) for note in self.notes)
        return next((value for value in values if value is not None), None)

    @property
    def section(self) -> type[BaseModel] | None:
        """The model, where this is a section of the recipe."""
        return self.kind if isinstance(self.kind, type) and issubclass(self.kind, BaseModel) else None


def alternatives_of(annotation: Any) -> list[Alternative]:
    """The alternatives of an annotation, in the order they are written."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *notes = get_args(annotation)
        flat = _flat_notes(notes)
        return [Alternative(one.kind, one.of, one.notes + flat) for one in alternatives_of(inner)]
    if origin in (Union, types.UnionType):
        return [alternative for part in get_args(annotation) for alternative in alternatives_of(part)]
    if origin is Literal:
        return [Alternative(Literal, get_args(annotation))]
    if origin in (list, dict):
        return [Alternative(origin, get_args(annotation)[-1])]
    return [Alternative(annotation)]


def _flat_notes(notes: typing.Iterable[Any]) -> tuple[Any, ...]:
    """Annotations with the constraints inside pydantic's `Field(...)` laid open."""
    return tuple(inner for note in notes for inner in (note.metadata if isinstance(note, FieldInfo) else [note]))


@functools.cache
def fields(section: type[BaseModel]) -> dict[str, Any]:
    """The keys of a section with their annotations, constraints included, in schema order."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


def annotation_at(annotation: Any, path: PathParts) -> Any:
    """The annotation of the value at `path`; None where the schema knows none."""
    for part in path:
        annotation = _annotation_of(annotation, part)
    return annotation


def _annotation_of(annotation: Any, part: str | int) -> Any:
    for one in alternatives_of(annotation):
        if one.kind is (list if isinstance(part, int) else dict):
            return one.of
        if one.section and part in fields(one.section):
            return fields(one.section)[str(part)]
    return None


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section among an annotation's alternatives."""
    return next((one.section for one in alternatives_of(annotation) if one.section), None)


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted name of every key that a section may hold, its sections' keys included."""
    names = []
    for name, annotation in fields(section).items():
        names.append(prefix + name)
        if inner := section_of(annotation):
            names += keys(inner, f"{prefix}{name}.")
    return names


def words(annotation: Any) -> list[str]:
    """Every fixed word that may be written: of tables and of Literals."""
    names: list[str] = []
    for one in alternatives_of(annotation):
        table = one.note(WordOf)
        if one.kind is Literal:
            names += [word for word in one.of if isinstance(word, str)]
        elif table and one.kind is str:
            names += table.names()
    return names


def default_at(section: type[BaseModel], name: str) -> Any:
    """The default of a section's key; PydanticUndefined when it must be written."""
    return section.model_fields[name].get_default(call_default_factory=True)


def describe(annotation: Any) -> str:
    """What a field accepts, for example `a whole number above 0, or auto`."""
    if get_origin(annotation) is Annotated:
        wording = next((note for note in _flat_notes(get_args(annotation)[1:]) if isinstance(note, Wording)), None)
        if wording:
            return wording.text
    every = alternatives_of(annotation)
    others = [one.kind for one in every if one.kind not in (list, type(None), float)]
    parts = [
        "a list of these"
        if one.kind is list and len(every) > 1 and [item.kind for item in alternatives_of(one.of)] == others
        else _describe(one)
        for one in every
    ]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f", or {parts[-1]}"


def _describe(one: Alternative) -> str:
    table, role, wording = one.note(WordOf), one.note(PathRole), one.note(Wording)
    if wording:
        return wording.text
    if one.kind in (int, float):
        noun = "whole number" if one.kind is int else "number"
        if one.bound("gt") == 0 and one.bound("lt") is None and one.bound("le") is None:
            return f"a positive {noun}"
        return f"a {noun}{_bounds(one)}"
    if one.kind is Literal or (table and one.kind is str):
        names = table.names() if table else [str(word) for word in one.of]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if one.kind is list:
        return f"a list, each item {describe(one.of)}"
    if one.kind is dict:
        return f"a mapping, each value {describe(one.of)}"
    if one.section:
        return f"a mapping with the keys {', '.join(fields(one.section))}"
    if role:
        return "a path or a hub id" if role.or_hub else "a path"
    return {type(None): "null", bool: "true or false"}.get(one.kind, "a text")


def _bounds(one: Alternative) -> str:
    above, least, below, most = (one.bound(name) for name in ("gt", "ge", "lt", "le"))
    if above is not None:
        end = f" and below {below}" if below is not None else f" and at most {most:g}" if most is not None else ""
        return f" above {above}{end}"
    if least is not None:
        end = f"below {below}" if below is not None else f"{most:g}" if most is not None else ""
        return f" from {least} to {end}" if end else f" of at least {least}"
    return f" below {below}" if below is not None else f" of at most {most}" if most is not None else ""


def example(annotation: Any, default: Any = PydanticUndefined) -> str:
    """A value that can be written, as YAML: the default where there is one."""
    if isinstance(default, (bool, int, float, str)) and default != "":
        return _yaml(default)
    return next((text for text in map(_example, alternatives_of(annotation)) if text), "null")


def _example(one: Alternative) -> str:
    table, role, wording = one.note(WordOf), one.note(PathRole), one.note(Wording)
    if wording:
        return wording.example
    if one.kind in (int, float):
        is_share = one.kind is float and one.bound("lt") is not None
        return "0.1" if is_share else str(one.bound("ge") or (one.bound("gt") or 0) + 1)
    if one.kind is Literal:
        return _yaml(one.of[0])
    if one.kind is list:
        return f"[{example(one.of)}]"
    if one.kind is dict:
        return f"{{name: {example(one.of)}}}"
    if one.section:
        return section_example(one.section)
    if one.kind is str:
        return table.names()[0] if table else role.example if role else "text"
    return "true" if one.kind is bool else ""


def section_example(section: type[BaseModel]) -> str:
    """The keys that must be written, or else the first one with a default to show."""
    annotations = fields(section)
    required = [name for name in annotations if section.model_fields[name].is_required()]
    optional = [name for name in annotations if default_at(section, name) is not None]
    pairs = (f"{name}: {example(annotations[name], default_at(section, name))}" for name in required or optional[:1])
    return f"{{{', '.join(pairs)}}}"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def accepts(annotation: Any, value: Any) -> bool:
    """Would this value be right?"""
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
