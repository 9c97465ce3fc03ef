"""A composed recipe against the schema and the rules: every mistake in one pass, one problem each."""

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from lorakit.recipe import suggestions
from lorakit.recipe.compose import Composition
from lorakit.recipe.paths import resolve_paths
from lorakit.recipe.problem import Location, PathParts, Problem, dotted_name, quote
from lorakit.recipe.rules import RULES
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import alternatives_of, annotation_at, describe
from lorakit.recipe.yaml_reader import Node, find, plain

# What stands in for a required key that is missing or wrong, so that the rules can read the rest.
STAND_INS = {"model": {"base": "stand-in"}, "data": {"train": "stand-in"}}


def validate(composition: Composition, written: Collection[str], ended: bool = False) -> tuple[Recipe, list[Problem]]:
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
        if kind == "extra_forbidden":
            problem, name = _unknown_key(root, path)
            meant.add(name)
        elif kind == "missing":
            if not composition.complete or _is_meant(path, meant):
                continue
            reason = "the section is missing" if len(path) == 1 else "this key must be written"
            problem = Problem(_place(root, path), dotted_name(path), "", reason, suggestions.for_missing(path))
        else:
            problem = _wrong_value(root, path)
        if (problem.place, problem.path) not in reported:
            problems.append(problem)
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


def _unknown_key(root: Node, path: PathParts) -> tuple[Problem, str]:
    """The problem, and the dotted name of the key that was probably meant (or nothing)."""
    node = find(root, path) or root
    remedy, meant = suggestions.for_unknown_key(path, plain(node))
    place = node.key or node.place
    return Problem(place, dotted_name(path), quote(plain(node)), "there is no such key", remedy), meant


def _wrong_value(root: Node, path: PathParts) -> Problem:
    node = find(root, path) or root
    value = quote(plain(node))
    reason = f"{value} is not {describe(annotation_at(Recipe, path))}"
    return Problem(node.place, dotted_name(path), value, reason, suggestions.for_value(node, path))


def _is_meant(path: PathParts, meant: Collection[str]) -> bool:
    """Did the user write this key, or all that this section needs, under another name?"""
    needed = STAND_INS.get(str(path[0]), {}) if len(path) == 1 else {}
    return dotted_name(path) in meant or (bool(needed) and all(f"{path[0]}.{key}" in meant for key in needed))


def _place(root: Node, path: PathParts) -> Location:
    """The value's place, or that of the innermost section around it; the file's start for the whole."""
    node = find(root, path)
    if node:
        return node.place
    for length in range(len(path) - 1, 0, -1):
        node = find(root, path[:length])
        if node:
            return node.key or node.place
    return root.place.at(1, 1)


def _without(data: Any, wrong: Collection[str]) -> Recipe:
    """The recipe without the sections and keys that are wrong, and with stand-ins for what must be there."""
    right: dict[str, Any] = {}
    for section, value in data.items() if isinstance(data, dict) else ():
        if dotted_name((section,)) in wrong:
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
        for conflict in rule(recipe, written):
            node = find(root, conflict.path)
            value = quote(plain(node)) if node else ""
            place, name = _place(root, conflict.path), dotted_name(conflict.path)
            problems.append(Problem(place, name, value, conflict.reason, conflict.remedy))
    return problems


def _inside(field: str, wrong: Collection[str]) -> bool:
    """Is this field wrong, or something in it?"""
    return any(name == field or name.startswith((f"{field}.", f"{field}[")) for name in wrong)
