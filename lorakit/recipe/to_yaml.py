"""A recipe as YAML text that `load` reads back to an equal recipe."""

import re
from pathlib import Path
from typing import Any

import yaml

from lorakit.recipe import yaml_reader
from lorakit.recipe.adapter_kind import unread_keys
from lorakit.recipe.paths import is_path, relative_path
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import annotation_at, path_role


class RecipeDumper(yaml.SafeDumper):
    """PyYAML's writer with YAML 1.2's rules for what needs quotes."""

    # Its own table is YAML 1.1's: it would write the text "1e-4" without quotes, which is a number.
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern in {
    "tag:yaml.org,2002:null": yaml_reader.NULL,
    "tag:yaml.org,2002:bool": yaml_reader.BOOL,
    "tag:yaml.org,2002:int": yaml_reader.INT,
    "tag:yaml.org,2002:float": yaml_reader.FLOAT,
    "tag:lorakit:no-text": yaml_reader.ENDLESS,
}.items():
    RecipeDumper.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern.pattern})\\Z"), None)


def to_yaml(recipe: Recipe, folder: Path) -> str:
    """YAML text of every key, in schema order, with paths relative to `folder`, where the text will be a file.

    Keys that nothing reads in this recipe are left out: written, they would be errors.
    """
    return dump_yaml(plain_recipe(recipe, folder))


def plain_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Every key that something reads, as plain data with paths relative to `folder`."""
    data: dict[str, Any] = with_relative_paths(recipe.model_dump(), folder)
    for name in unread_keys(recipe):
        section, key = name.split(".")
        del data[section][key]
    return data


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text that `yaml_reader` reads back as it was."""
    text: str = yaml.dump(data, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def with_relative_paths(data: dict[str, Any], folder: Path) -> Any:
    """A recipe's plain data with its absolute paths relative to `folder`."""
    return _relative(data, Recipe, folder.absolute())


def _relative(value: Any, annotation: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _relative(inner, annotation_at(annotation, (key,)), folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_relative(inner, annotation_at(annotation, (index,)), folder) for index, inner in enumerate(value)]
    names_a_file = isinstance(value, str) and is_path(value) and path_role(annotation)
    return relative_path(value, folder) if names_a_file else value
