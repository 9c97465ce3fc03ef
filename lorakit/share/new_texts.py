"""The texts of a new folder: a recipe with the keys that people change, each explained by the schema; its README."""

import re
import textwrap
from typing import Any

import yaml

from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import alternatives_of, default_at, fields, section_of
from lorakit.recipe.to_yaml import RecipeDumper

SCHEMA = "recipe.schema.json"
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA}"
_WIDTH = 110

# The keys of a new recipe, and those of them that are written only where a value is given.
_KEYS = {
    "model": ("base", "quantization"),
    "adapter": ("kind", "rank", "alpha"),
    "data": ("train", "eval", "format", "columns", "system", "max_length", "broken"),
    "train": ("epochs", "batch_size", "learning_rate"),
    "evaluate": ("metrics", "max_new_tokens"),
}
_WHERE_GIVEN = ("data.columns", "data.broken")

# They show the form, and are replaced.
_COUNTRIES = (
    "France Paris, Italy Rome, Japan Tokyo, Kenya Nairobi, Peru Lima, Norway Oslo, Egypt Cairo, Cuba Havana, "
    "Ghana Accra, Greece Athens, Spain Madrid, Austria Vienna, Poland Warsaw, Portugal Lisbon, Chile Santiago, "
    "Ireland Dublin, Nepal Kathmandu, Vietnam Hanoi, Hungary Budapest, Iran Tehran"
)
EXAMPLE_ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is the capital of {country}?"},
            {"role": "assistant", "content": f"{capital}."},
        ]
    }
    for country, capital in (pair.split() for pair in _COUNTRIES.split(", "))
]


class _BlockDumper(RecipeDumper):
    """Texts of several lines as blocks."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_BlockDumper.add_representer(str, _write_text)


def scalar(value: str) -> str:
    """A text as YAML on one line."""
    return _entry("key", value)[0].removeprefix("key: ")


def recipe_text(values: dict[str, Any], notes: list[str]) -> str:
    """A recipe with the values of these dotted keys, and the defaults of others that people change. Above each key is
    its meaning in the schema, and what the notes that begin with its name say."""
    intro = "The keys that are changed most. lorakit check prints all others with their values."
    lines = [SCHEMA_LINE, f"# {intro}", "", *_explained(Recipe, "name", "name", values, notes)]
    for section, keys in _KEYS.items():
        model = section_of(fields(Recipe)[section])
        assert model is not None
        lines += ["", *_comment(model.__doc__ or ""), f"{section}:"]
        for key in keys:
            name = f"{section}.{key}"
            if name in values or name not in _WHERE_GIVEN:
                lines += textwrap.indent("\n".join(_explained(model, key, name, values, notes)), "  ").splitlines()
    return "\n".join(lines) + "\n"


def _explained(section: Any, key: str, name: str, values: dict[str, Any], notes: list[str]) -> list[str]:
    words = _words(fields(section)[key])
    meaning = section.model_fields[key].description or ""
    comments = [meaning, f"Words: {', '.join(words)}." if words else ""]
    comments += [note for note in notes if note.startswith((f"{name}:", f"{name} "))]
    lines = [line for comment in filter(None, comments) for line in _comment(comment)]
    return [*lines, *_entry(key, values.get(name, default_at(section, key)))]


def _words(annotation: Any) -> list[str]:
    """The words that a key takes, or the items of its list."""
    items = [branch.of for branch in alternatives_of(annotation) if branch.kind is list]
    return [str(word) for part in (annotation, *items) for one in alternatives_of(part) for word in one.words]


def _comment(text: str) -> list[str]:
    wrapped = textwrap.wrap(" ".join(text.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in wrapped]


def _entry(key: str, value: Any) -> list[str]:
    flow = isinstance(value, list)
    text = yaml.dump({key: value}, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True, width=100_000)
    if flow:
        inner = yaml.dump(value, Dumper=_BlockDumper, default_flow_style=True, allow_unicode=True, width=100_000)
        text = f"{key}: {inner}"
    return str(text).splitlines()


def new_readme(name: str, commands: list[str], rows: str, given: bool) -> str:
    """The README of a recipe of one's own."""
    place = (
        f"The rows are read from `{rows}`, where they lie."
        if given
        else f"`{rows}` holds twenty rows that only show the form: put yours in their place, one JSON object a line, "
        "or name another file in `data.train` (JSON Lines, JSON, CSV, Parquet and others, in any of the formats of "
        "`data.format`)."
    )
    return f"# {name}\n\n{_filled(place)}\n\n{_typed(commands)}"


def copied_readme(page: str, task: str, name: str, commands: list[str]) -> str:
    """The README of a task of the gallery as a copy has it: for its own folder and its own runs, and with no links to
    what lies beside the gallery."""
    page = page.replace(f"recipes/{task}/", "").replace(f"runs/{task}", f"runs/{name}")
    page = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", page)
    heading, _, rest = page.partition("\n")
    origin = (
        f"A copy of `recipes/{task}` of lorakit's gallery, made by `lorakit new {name} --from {task}`. What built its "
        "rows is there, not here."
    )
    return f"{heading}\n\n{_filled(origin)}\n\n{_typed(commands)}\n{rest.lstrip()}"


def _typed(commands: list[str]) -> str:
    meanings = (
        "what is wrong with the recipe",
        "what is read, and what is wrong with the rows",
        "",
        "base and adapter",
    )
    width = max(map(len, commands))
    lines = [f"{one:{width}}  # {meaning}" if meaning else one for one, meaning in zip(commands, meanings, strict=True)]
    return "In this folder:\n\n```bash\n" + "\n".join(lines) + "\n```\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
