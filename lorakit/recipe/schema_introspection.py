"""The recipe's annotations as plain data: which kinds of value a field takes, and which annotation is at a path."""

import functools
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

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
        """The model, where this branch is a section of the recipe."""
        return self.kind if isinstance(self.kind, type) and issubclass(self.kind, BaseModel) else None


def alternatives_of(annotation: Any) -> list[Alternative]:
    """The alternatives of an annotation, in the order they are written."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *notes = get_args(annotation)
        flat = flat_notes(notes)
        return [Alternative(branch.kind, branch.of, branch.notes + flat) for branch in alternatives_of(inner)]
    if origin in (Union, types.UnionType):
        return [branch for part in get_args(annotation) for branch in alternatives_of(part)]
    if origin is Literal:
        return [Alternative(Literal, get_args(annotation))]
    if origin is list:
        return [Alternative(list, get_args(annotation)[0])]
    if origin is dict:
        return [Alternative(dict, get_args(annotation)[1])]
    return [Alternative(annotation)]


def flat_notes(notes: typing.Iterable[Any]) -> tuple[Any, ...]:
    """Annotations with the constraints inside pydantic's `Field(...)` laid open."""
    return tuple(inner for note in notes for inner in (note.metadata if isinstance(note, FieldInfo) else [note]))


@functools.cache
def fields(section: type[BaseModel]) -> dict[str, Any]:
    """The keys of a section with their annotations, constraints kept, in schema order."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


def child(annotation: Any, part: str | int) -> Any:
    """The annotation of the value behind one key or list index; None where the schema knows none."""
    for branch in alternatives_of(annotation):
        if isinstance(part, int):
            if branch.kind is list:
                return branch.of
        elif branch.section and part in fields(branch.section):
            return fields(branch.section)[part]
        elif branch.kind is dict:
            return branch.of
    return None


def annotation_at(annotation: Any, path: PathParts) -> Any:
    """The annotation of the value at `path`; None where the schema knows none."""
    for part in path:
        annotation = child(annotation, part)
        if annotation is None:
            return None
    return annotation


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section among an annotation's alternatives."""
    return next((branch.section for branch in alternatives_of(annotation) if branch.section), None)


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted name of every key that a section may hold, its sections' keys included."""
    found = []
    for name, annotation in fields(section).items():
        found.append(prefix + name)
        inner = section_of(annotation)
        if inner:
            found += keys(inner, f"{prefix}{name}.")
    return found
