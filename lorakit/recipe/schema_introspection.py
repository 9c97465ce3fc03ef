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

from lorakit.recipe.chat_templates import CHAT_TEMPLATES
from lorakit.recipe.fields import PathRole, Wording
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
    def words(self) -> list[Any]:
        """What may be written, where this is a Literal."""
        return list(self.of) if self.kind is Literal else []

    @property
    def section(self) -> type[BaseModel] | None:
        """The model, where this is a section of the recipe."""
        return self.kind if isinstance(self.kind, type) and issubclass(self.kind, BaseModel) else None


def alternatives_of(annotation: Any) -> list[Alternative]:
    """The alternatives of an annotation, in the order they are written."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *notes = get_args(annotation)
        # with the constraints inside pydantic's `Field(...)` laid open
        flat = tuple(one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note]))
        return [Alternative(one.kind, one.of, one.notes + flat) for one in alternatives_of(inner)]
    if origin in (Union, types.UnionType):
        return [alternative for part in get_args(annotation) for alternative in alternatives_of(part)]
    if origin is Literal:
        return [Alternative(Literal, get_args(annotation))]
    if origin in (list, dict):
        return [Alternative(origin, get_args(annotation)[-1])]
    return [Alternative(annotation)]


@functools.cache
def fields(section: type[BaseModel]) -> dict[str, Any]:
    """The keys of a section with their annotations, constraints included, in schema order."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


def annotation_at(annotation: Any, path: PathParts) -> Any:
    """The annotation of the value at `path`; None where the schema knows none."""
    for part in path:
        kind = list if isinstance(part, int) else dict
        inner = (
            one.of if one.kind is kind else fields(one.section).get(str(part)) if one.section else None
            for one in alternatives_of(annotation)
        )
        annotation = next((one for one in inner if one is not None), None)
    return annotation


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section among an annotation's alternatives."""
    return next((one.section for one in alternatives_of(annotation) if one.section), None)


def path_role(annotation: Any) -> PathRole | None:
    """What a text means on disk, where the field takes one that names something there."""
    return next(filter(None, (one.note(PathRole) for one in alternatives_of(annotation) if one.kind is str)), None)


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted name of every key that a section may hold, its sections' keys included."""
    names = []
    for name, annotation in fields(section).items():
        inner = section_of(annotation)
        names += [prefix + name, *(keys(inner, f"{prefix}{name}.") if inner else [])]
    return names


def words(annotation: Any) -> list[str]:
    """Every fixed word that may be written: of tables and of Literals."""
    return [word for one in alternatives_of(annotation) for word in one.words if isinstance(word, str)]


def default_at(section: type[BaseModel], name: str) -> Any:
    """The default of a section's key; PydanticUndefined when it must be written."""
    return section.model_fields[name].get_default(call_default_factory=True)


def describe(annotation: Any) -> str:
    """What a field accepts, for example `a whole number above 0, or auto`."""
    every = alternatives_of(annotation)
    outermost = [next((note for note in reversed(one.notes) if isinstance(note, Wording)), None) for one in every]
    if outermost[0] and set(outermost) == {outermost[0]}:
        return outermost[0].text
    others = [one.kind for one in every if one.kind not in (list, type(None), float)]
    parts = [
        "a list of these"
        if one.kind is list and len(every) > 1 and [item.kind for item in alternatives_of(one.of)] == others
        else _describe(one)
        for one in every
    ]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f", or {parts[-1]}"


def _describe(one: Alternative) -> str:
    role, wording = one.note(PathRole), one.note(Wording)
    if wording:
        return wording.text
    if one.kind in (int, float):
        noun = "whole number" if one.kind is int else "number"
        ends = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
        bounds = [f"{words} {one.bound(end):.10g}" for end, words in ends.items() if one.bound(end) is not None]
        return f"a positive {noun}" if bounds == ["above 0"] else f"a {noun} {' and '.join(bounds)}".strip()
    if one.words:
        return f"{'one of ' if one.words[1:] else ''}{', '.join(map(str, one.words))}"
    if one.kind is list:
        return f"a list, each item {describe(one.of)}"
    if one.kind is dict:
        return f"a mapping, each value {describe(one.of)}"
    if one.section:
        return f"a mapping with the keys {', '.join(fields(one.section))}"
    if role:
        if role.or_template:
            return f"a name such as {next(iter(CHAT_TEMPLATES))}, or a path"
        return "a path or a hub id" if role.or_hub else "a path"
    return {type(None): "null", bool: "true or false"}.get(one.kind, "a text")


def example(annotation: Any, default: Any = PydanticUndefined) -> str:
    """A value that can be written, as YAML: the default where there is one."""
    if isinstance(default, (bool, int, float, str)) and default != "":
        return _yaml(default)
    return next((text for text in map(_example, alternatives_of(annotation)) if text), "null")


def _example(one: Alternative) -> str:
    role, wording = one.note(PathRole), one.note(Wording)
    if wording:
        return wording.example
    if one.words:
        return _yaml(one.words[0])
    if one.kind in (int, float):
        is_share = one.kind is float and one.bound("lt") is not None
        return "0.1" if is_share else str(one.bound("ge") or (one.bound("gt") or 0) + 1)
    if one.kind is list:
        return f"[{example(one.of)}]"
    if one.kind is dict:
        return f"{{name: {example(one.of)}}}"
    if one.section:
        return section_example(one.section)
    if one.kind is str:
        return role.example if role else "text"
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
