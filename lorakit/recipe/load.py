"""The front door of recipes: a file, what it extends and `--set` -> one checked Recipe; and back to YAML."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit.errors import BaseModelError, UserError
from lorakit.recipe import suggestions
from lorakit.recipe.compose import Composition, compose
from lorakit.recipe.compose import setting_node as setting_node
from lorakit.recipe.paths import inlined_files, resolve_paths
from lorakit.recipe.problem import LocatedError, Location, PathParts, Problem, dotted_name, quote
from lorakit.recipe.problem import RecipeErrors as RecipeErrors
from lorakit.recipe.rules import RULES
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import alternatives_of, annotation_at, describe
from lorakit.recipe.to_yaml import to_yaml as to_yaml
from lorakit.recipe.yaml_reader import Node, children, find, plain


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that can be used: paths absolute, defaults filled in."""

    recipe: Recipe
    path: Path
    places: Mapping[str, Location] = field(repr=False)
    """Where each dotted name that the user wrote is written: in the file, in its parents or with `--set`."""
    files: tuple[Path, ...] = ()
    """The recipe's file, those that it extends, by their real paths, and those whose texts it takes in."""

    def where(self, name: str) -> str:
        """`recipes/x.yaml:12:9`, the `--set` option, or `default`."""
        return str(self.places[name]) if name in self.places else "default"

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Within this, an error about the recipe's base, or one that begins with a key, says where that is written."""
        try:
            yield
        except RecipeErrors:
            raise
        except UserError as error:
            text = f"model.base: {error}" if isinstance(error, BaseModelError) else str(error)
            name = place = text.partition(":")[0]
            parts = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", name)]
            if "." not in name or annotation_at(Recipe, tuple(parts)) is None:  # a file train.jsonl is no key
                raise
            while place and place not in self.places:  # of a key that has its default, where its section is
                place = place[: max(place.rfind("."), place.rfind("["), 0)]
            location = self.places[place] if place else Location(self.path)
            raise LocatedError(location, name, text) from error


def load(
    path: Path, overrides: Sequence[str | Node] = (), ended: bool = False, text: str | None = None
) -> LoadedRecipe:
    """Read and check a recipe; of a run that has `ended` the rows that it names may be gone. `text`: of a recipe that
    is not in its file yet.

    Raises:
        RecipeErrors: every mistake in it, in the order of the file.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links, and show another name)
    composition = compose(path, overrides, text)
    if composition.root is None:
        raise RecipeErrors(composition.problems)
    places = dict(_places(composition.root, ()))
    recipe, problems = _validate(composition, places.keys(), ended)
    if problems:  # of the recipe itself first, then of what it extends, then of `--set`
        problems.sort(key=lambda one: (one.place.setting > "", one.place.file != path, one.place.sort_key))
        raise RecipeErrors(problems)
    files = (*map(Path, composition.nodes), *inlined_files(composition.root))
    return LoadedRecipe(_with_defaults(recipe, path, places.keys()), path, places, files)


def _places(node: Node, path: PathParts) -> Iterator[tuple[str, Location]]:
    for part, child in children(node):
        yield dotted_name((*path, part)), child.place
        yield from _places(child, (*path, part))


def _with_defaults(recipe: Recipe, path: Path, written: Collection[str]) -> Recipe:
    """Fill in the defaults that depend on the file's name and on other keys; what is written stays as it is."""
    stem = path.parent.name if path.stem == "recipe" else path.stem
    name = recipe.name or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-") or "recipe"
    folder = f"runs/{name}" if recipe.output.dir is None else os.path.expanduser(recipe.output.dir)  # noqa: PTH111
    train = recipe.train
    if train.steps is not None and "train.epochs" not in written:
        train = train.model_copy(update={"epochs": None})
    output = recipe.output.model_copy(update={"dir": folder})
    return recipe.model_copy(update={"name": name, "output": output, "train": train})


# What stands in for a required key that is missing or wrong, so that the rules can read the rest.
STAND_INS = {"model": {"base": "stand-in"}, "data": {"train": "stand-in"}}


def _validate(composition: Composition, written: Collection[str], ended: bool = False) -> tuple[Recipe, list[Problem]]:
    """The recipe with absolute paths, and everything that is wrong with it, problems of its composition included.

    With problems the recipe lacks what is wrong. A missing key is no mistake where something could not be read.
    `ended`: as in `resolve_paths`.
    """
    root = composition.root or Node(None, Location())
    data, path_problems = resolve_paths(root, ended)
    problems = [*composition.problems, *path_problems]
    reported = {(problem.place, problem.path) for problem in problems}
    recipe, mistakes = _read(data)
    meant: set[str] = set()
    for path, kind in mistakes.items():
        node, place = find(root, path), _place(root, path)
        value = quote(plain(node)) if node else ""
        if kind == "missing":
            if not composition.complete or _is_meant(path, meant):
                continue
            reason = "the section is missing" if len(path) == 1 else "this key must be written"
            remedy = suggestions.for_missing(path)
        elif kind == "extra_forbidden":
            remedy, name = suggestions.for_unknown_key(path, plain(node) if node else None)
            reason = "there is no such key"
            place = node.key if node and node.key else place
            meant.add(name)
        else:
            reason = f"expected {describe(annotation_at(Recipe, path))}, got {value}"
            remedy = suggestions.for_value(node or root, path)
        if (place, dotted_name(path)) not in reported:
            problems.append(Problem(place, dotted_name(path), value, reason, remedy))
    wrong = {*meant, *map(dotted_name, mistakes), *(problem.path for problem in composition.problems)}
    if recipe is None or composition.problems:
        recipe = _without(data, wrong)
    return recipe, problems + _broken_rules(recipe, root, written, wrong)


def _read(data: Any) -> tuple[Recipe | None, dict[PathParts, str]]:
    """The recipe, or each mistake's path with pydantic's kind for it."""
    try:
        return Recipe.model_validate(data), {}
    except ValidationError as error:
        mistakes = [(_location(each["loc"]), each["type"]) for each in error.errors(include_url=False)]
    # A union reports every alternative. The one whose inside is wrong is the one that was meant: its error is deeper.
    inner = {path[:length] for path, _ in mistakes for length in range(len(path))}
    # Unknown keys come first: the one that was meant is then not missing as well.
    mistakes.sort(key=lambda mistake: mistake[1] != "extra_forbidden")
    return None, {path: kind for path, kind in mistakes if path not in inner}


def _location(loc: PathParts) -> PathParts:
    """pydantic's location without the names of alternatives, which it puts after every key that has several."""
    path: PathParts = ()
    annotation: Any = Recipe
    named = False
    for part in loc:
        alternatives = [branch for branch in alternatives_of(annotation) if branch.kind is not type(None)]
        if len(alternatives) > 1 and not named:
            named = True
            continue
        path, annotation, named = (*path, part), annotation_at(annotation, (part,)), False
    return path


def _is_meant(path: PathParts, meant: Collection[str]) -> bool:
    """Did the user write this key, or all that this section needs, under another name?"""
    needed = STAND_INS.get(str(path[0]), {}) if len(path) == 1 else {}
    return dotted_name(path) in meant or (bool(needed) and all(f"{path[0]}.{key}" in meant for key in needed))


def _place(root: Node, path: PathParts) -> Location:
    """The value's place, or that of the innermost section around it; the file's start for the whole."""
    if node := find(root, path):
        return node.place
    around = (find(root, path[:length]) for length in range(len(path) - 1, 0, -1))
    return next((node.key or node.place for node in around if node), root.place.at(1, 1))


def _without(data: Any, wrong: Collection[str]) -> Recipe:
    """The recipe without the sections and keys that are wrong, and with stand-ins for what must be there."""
    right: dict[str, Any] = {}
    for section, value in data.items() if isinstance(data, dict) else ():
        name = dotted_name((section,))
        if name in wrong or (not isinstance(value, dict) and _inside(name, wrong)):
            continue
        if isinstance(value, dict):
            value = {key: inner for key, inner in value.items() if not _inside(dotted_name((section, key)), wrong)}
        right[section] = value
    for section, keys in STAND_INS.items():
        right[section] = {**keys, **right.get(section, {})}
    return Recipe.model_validate(right)


def _broken_rules(recipe: Recipe, root: Node, written: Collection[str], wrong: Collection[str]) -> list[Problem]:
    problems = []
    for rule, reads in RULES:
        if any(field.partition(".")[0] in wrong or _inside(field, wrong) for field in reads):
            continue
        for path, reason, remedy in rule(recipe, written):
            node = find(root, path)
            value = quote(plain(node)) if node else ""
            problems.append(Problem(_place(root, path), dotted_name(path), value, reason, remedy))
    return problems


def _inside(field: str, wrong: Collection[str]) -> bool:
    return any(name == field or name.startswith((f"{field}.", f"{field}[")) for name in wrong)
