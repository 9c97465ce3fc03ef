"""What a field accepts, in plain English, from its annotation. Errors and docs say the same words."""

import json
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lorakit.recipe.fields import PathRole, Wording, WordOf
from lorakit.recipe.schema_introspection import Alternative, alternatives_of, fields, flat_notes


def describe(annotation: Any) -> str:
    """For example `a whole number above 0, or auto`."""
    if get_origin(annotation) is Annotated:
        for note in flat_notes(get_args(annotation)[1:]):
            if isinstance(note, Wording):
                return note.text
    parts = _parts(annotation)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f", or {parts[-1]}"


def words(annotation: Any) -> list[str]:
    """Every fixed word that may be written: of tables and of Literals."""
    found: list[str] = []
    for branch in alternatives_of(annotation):
        table = branch.note(WordOf)
        if branch.kind is Literal:
            found += [word for word in branch.of if isinstance(word, str)]
        elif table and branch.kind is str:
            found += table.names()
    return found


def example(annotation: Any, default: Any = PydanticUndefined) -> str:
    """A value that can be written, as YAML: the default where there is one."""
    if isinstance(default, (bool, int, float, str)) and default != "":
        return _yaml(default)
    return next((text for text in map(_example, alternatives_of(annotation)) if text), "null")


def default_at(section: type[BaseModel], name: str) -> Any:
    """The default of a section's key; PydanticUndefined when it must be written."""
    return section.model_fields[name].get_default(call_default_factory=True)


def _parts(annotation: Any) -> list[str]:
    alternatives = alternatives_of(annotation)
    others = [branch for branch in alternatives if branch.kind is not list]
    parts = []
    for branch in alternatives:
        if (
            branch.kind is list
            and others
            and [item.kind for item in alternatives_of(branch.of)]
            == [other.kind for other in others if other.kind not in (type(None), float)]
        ):
            parts.append("a list of these")
        else:
            parts.append(_branch(branch))
    return parts


def _branch(branch: Alternative) -> str:
    said = branch.note(Wording)
    if said:
        return said.text
    if branch.kind is type(None):
        return "null"
    if branch.kind is bool:
        return "true or false"
    if branch.kind in (int, float):
        noun = "a whole number" if branch.kind is int else "a number"
        return noun + _bounds(branch)
    if branch.kind is Literal:
        return _one_of([str(word) for word in branch.of])
    if branch.kind is list:
        return f"a list, each item {describe(branch.of)}"
    if branch.kind is dict:
        return f"a mapping, each value {describe(branch.of)}"
    if branch.section:
        return f"a mapping with the keys {', '.join(fields(branch.section))}"
    return _text(branch)


def _text(branch: Alternative) -> str:
    table, role = branch.note(WordOf), branch.note(PathRole)
    if table:
        return _one_of(table.names())
    if role:
        return "a path or a hub id" if role.or_hub else "a path"
    return "a text"


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _bounds(branch: Alternative) -> str:
    low, least = branch.bound("gt"), branch.bound("ge")
    high, most = branch.bound("lt"), branch.bound("le")
    above = f" above {low}" if low is not None else f" from {least}" if least is not None else ""
    below = f" below {high}" if high is not None else f" to {most}" if most is not None else ""
    if low is not None and most is not None:
        return f" above {low} and at most {most:g}"
    if above and below:
        return f"{above} {'and' if least is None else 'to'}{below.replace(' to', '')}"
    if least is not None:
        return f" of at least {least}"
    if most is not None:
        return f" of at most {most}"
    return above or below


def _example(branch: Alternative) -> str:
    said = branch.note(Wording)
    if said:
        return said.example
    table, role = branch.note(WordOf), branch.note(PathRole)
    if branch.kind in (int, float):
        if branch.bound("lt") is not None and branch.kind is float:
            return "0.1"
        return str(branch.bound("ge") or (branch.bound("gt") or 0) + 1)
    if branch.kind is bool:
        return "true"
    if branch.kind is Literal:
        return _yaml(branch.of[0])
    if branch.kind is list:
        return f"[{example(branch.of)}]"
    if branch.kind is dict:
        return f"{{name: {example(branch.of)}}}"
    if branch.section:
        return section_example(branch.section)
    if branch.kind is str:
        return table.names()[0] if table else role.example if role else "text"
    return ""


def section_example(section: type[BaseModel]) -> str:
    """The keys that must be written, or else the first one with a default to show."""
    annotations = fields(section)
    required = [name for name in annotations if section.model_fields[name].is_required()]
    shown = [name for name in annotations if default_at(section, name) is not None]
    chosen = required or shown[:1]
    pairs = (f"{name}: {example(annotations[name], default_at(section, name))}" for name in chosen)
    return f"{{{', '.join(pairs)}}}"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
