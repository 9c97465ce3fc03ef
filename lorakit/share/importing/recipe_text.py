"""The recipe as text, each key with the key of the config that it comes of, and read back before it is written."""

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import keys as schema_keys
from lorakit.recipe.to_yaml import RecipeDumper, with_relative_paths
from lorakit.share.importing.conversion import Conversion

_ORDER = ("model", "adapter", "data", "train", "evaluate", "output")
_LONGEST_ORIGINS = 3


def recipe_text(c: Conversion, output: Path) -> str | None:
    """The recipe in a file at `output`; None where the base or the rows are missing."""
    if "model.base" not in c.recipe or "data.train" not in c.recipe:
        return None
    tree: dict[str, dict[str, Any]] = {section: {} for section in _ORDER}
    places = {name: at for at, name in enumerate(schema_keys(Recipe))}
    for name in sorted(c.recipe, key=lambda name: places.get(name, len(places))):
        section, _, key = name.partition(".")
        if key:
            tree[section][key] = c.recipe[name]
    _leave_out_unread(tree)
    tree = with_relative_paths(tree, output.absolute().parent)
    lines = [f"# Imported by `lorakit import` from a config of {c.tool}; after # is the key that a value comes of."]
    for section, values in tree.items():
        if values:
            lines.append(f"{section}:")
            for key, value in values.items():
                lines += _entry(key, value, _comment(c, f"{section}.{key}"))
    if "track" in c.recipe:
        lines += [line[2:] for line in _entry("track", c.recipe["track"], _comment(c, "track"))]
    return "\n".join(lines) + "\n"


def _leave_out_unread(tree: dict[str, dict[str, Any]]) -> None:
    """Keys that nothing would read are errors in a recipe."""
    if tree["model"].get("quantization", "none") in ("none", "q8"):
        tree["model"].pop("double_quant", None)
    if tree["train"].get("schedule", "cosine") == "constant":
        tree["train"].pop("min_rate", None)
    if tree["adapter"].get("kind") == "none":
        for key in ("rank", "alpha", "dropout", "train_modules"):
            tree["adapter"].pop(key, None)
        tree["train"].pop("lora_plus", None)


def _comment(c: Conversion, name: str) -> str:
    origins = c.origins.get(name, [])
    if not origins:
        return f"{c.tool}'s default"
    more = ", ..." if len(origins) > _LONGEST_ORIGINS else ""
    return ", ".join(origins[:_LONGEST_ORIGINS]) + more


def _entry(key: str, value: Any, comment: str) -> list[str]:
    text = yaml.dump({key: value}, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100_000)
    lines = [f"  {line}" for line in text.splitlines()]
    if len(lines) == 1 or lines[0] == f"  {key}:":
        return [f"{lines[0]}  # {comment}", *lines[1:]]
    return [f"  # {comment}", *lines]


def check_text(text: str, output: Path, c: Conversion) -> list[str]:
    """What lorakit's rules have against the recipe, each with the config's keys that led there. Files need not be here
    yet: a config may be of another machine."""
    folder = output.absolute().parent
    place = folder if folder.is_dir() and os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=place, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        try:
            load(Path(file.name), ended=True)
        except RecipeErrors as error:
            return [_problem(c, problem.path, problem.reason) for problem in error.problems]
    return []


def _problem(c: Conversion, path: str, reason: str) -> str:
    name = path
    while name and name not in c.origins:
        name = name[: max(name.rfind("."), name.rfind("["), 0)]
    origins = c.origins.get(name)
    source = f" (from {', '.join(origins)})" if origins else f" ({c.tool}'s default)" if name else ""
    return f"{path}{source}: {reason}."
