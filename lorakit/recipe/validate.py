"""A composed recipe against the schema and the rules: every mistake in one pass, one problem each."""

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from lorakit.recipe import remedies
from lorakit.recipe.describe import describe
from lorakit.recipe.paths import resolve_paths
from lorakit.recipe.problems import PathParts, Place, Problem, dotted, shown
from lorakit.recipe.rules import RULES
from lorakit.recipe.schema import Recipe
from lorakit.recipe.shape import annotation_at, branches, child
from lorakit.recipe.strict_yaml import Node, find, plain

# What stands in for a required key that is missing or wrong, so that the rules can read the rest.
STAND_INS = {"model": {"base": "stand-in"}, "data": {"train": "stand-in"}}


def validate(
    root: Node, written: Collection[str], known: Collection[Problem], complete: bool
) -> tuple[Recipe, list[Problem]]:
    """The recipe with absolute paths, and what is wrong with it besides the `known` problems.

    With problems of either kind, the recipe lacks what is wrong. `complete` False: something could not be read, so that
    a missing key is no mistake of its own.
    """
    data, problems = resolve_paths(root)
    recipe, mistakes = _read(data)
    wrong = {problem.path for problem in known}
    named = {(problem.place, problem.path) for problem in [*known, *problems]}
    for path, kind in mistakes.items():
        wrong.add(dotted(path))
        problem, meant = _problem(root, path, kind)
        wrong.add(meant)
        if (problem.place, problem.path) not in named and (complete or kind != "missing"):
            problems.append(problem)
    if recipe is None or known:
        recipe = _without(data, wrong)
    return recipe, problems + _broken_rules(recipe, root, written, wrong)


def _read(data: Any) -> tuple[Recipe | None, dict[PathParts, str]]:
    """The recipe, or each mistake's path with pydantic's kind for it."""
    try:
        return Recipe.model_validate(data), {}
    except ValidationError as error:
        found = [(_location(each["loc"]), each["type"]) for each in error.errors(include_url=False)]
    # A union reports every alternative. The one whose inside is wrong is the one that was meant: its error is deeper.
    inner = {path[:length] for path, _ in found for length in range(len(path))}
    return None, {path: kind for path, kind in found if path not in inner}


def _location(loc: PathParts) -> PathParts:
    """pydantic's location without the names of alternatives, which it puts behind every key that has several."""
    path: PathParts = ()
    annotation: Any = Recipe
    named = False
    for part in loc:
        alternatives = [branch for branch in branches(annotation) if branch.kind is not type(None)]
        if len(alternatives) > 1 and not named:
            named = True
            continue
        path, annotation, named = (*path, part), child(annotation, part), False
    return path


def _problem(root: Node, path: PathParts, kind: str) -> tuple[Problem, str]:
    """What to tell the user, and the other key that was probably meant (or nothing)."""
    if kind == "missing":
        what = "the section is missing" if len(path) == 1 else "this key must be written"
        return Problem(_place(root, path), dotted(path), "", what, remedies.for_missing(path)), ""
    node = find(root, path) or root
    value = shown(plain(node))
    if kind == "extra_forbidden":
        remedy, meant = remedies.for_unknown_key(path)
        return Problem(node.key or node.place, dotted(path), value, "there is no such key", remedy), meant
    accepted = describe(annotation_at(Recipe, path))
    reason = f"{value} is not {accepted}"
    return Problem(node.place, dotted(path), value, reason, remedies.for_value(node, path)), ""


def _place(root: Node, path: PathParts) -> Place:
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
    kept: dict[str, Any] = {}
    for section, value in data.items() if isinstance(data, dict) else ():
        if dotted((section,)) in wrong:
            continue
        if isinstance(value, dict):
            value = {key: inner for key, inner in value.items() if not _inside(dotted((section, key)), wrong)}
        kept[section] = value
    for section, keys in STAND_INS.items():
        kept[section] = {**keys, **kept.get(section, {})}
    return Recipe.model_validate(kept)


def _broken_rules(recipe: Recipe, root: Node, written: Collection[str], wrong: Collection[str]) -> list[Problem]:
    problems = []
    for rule, reads in RULES:
        if any(field.partition(".")[0] in wrong or _inside(field, wrong) for field in reads):
            continue
        for found in rule(recipe, written):
            node = find(root, found.path)
            value = shown(plain(node)) if node else ""
            problems.append(Problem(_place(root, found.path), dotted(found.path), value, found.reason, found.remedy))
    return problems


def _inside(field: str, wrong: Collection[str]) -> bool:
    """Is this field wrong, or something in it?"""
    return any(name == field or name.startswith((f"{field}.", f"{field}[")) for name in wrong)
