"""The front door of recipes: a file, what it extends and `--set` -> one checked Recipe; and back to YAML."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.recipe.compose import compose
from lorakit.recipe.problem import LocatedError, Location, PathParts, Problem, dotted_name
from lorakit.recipe.problem import RecipeErrors as RecipeErrors
from lorakit.recipe.schema import Recipe
from lorakit.recipe.to_yaml import to_yaml as to_yaml
from lorakit.recipe.validate import validate
from lorakit.recipe.yaml_reader import Node, children

_DOTTED = re.compile(r"[a-z_]+(\.[a-z_]+|\[\d+\])*")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that can be used: paths absolute, defaults filled in."""

    recipe: Recipe
    path: Path
    places: Mapping[str, Location] = field(repr=False)
    """Where each dotted name that the user wrote is written."""
    files: tuple[Path, ...] = ()
    """The recipe's file and those that it extends, by their real paths."""

    @property
    def written(self) -> frozenset[str]:
        """The dotted names that the user wrote, in the file, in its parents or with `--set`."""
        return frozenset(self.places)

    def where(self, name: str) -> str:
        """`recipes/x.yaml:12:9`, the `--set` option, or `default`."""
        return str(self.places[name]) if name in self.places else "default"

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Within this, an error about a key of the recipe, which begins with the key, says where the key is written."""
        try:
            yield
        except RecipeErrors:
            raise
        except UserError as error:
            name = str(error).partition(":")[0]
            if not _is_key(name):
                raise
            raise LocatedError(self._place(name), name, str(error)) from error

    def _place(self, name: str) -> Location:
        """Where a key is written; of one that has its default, where its section is."""
        while name and name not in self.places:
            name = name[: max(name.rfind("."), name.rfind("["), 0)]
        return self.places[name] if name else Location(self.path)


def _is_key(name: str) -> bool:
    """Whether a dotted name is that of a key in a section: `train.steps` is one, a file train.jsonl is none."""
    section, _, key = name.partition(".")
    within = (
        getattr(Recipe.model_fields[section].annotation, "model_fields", {}) if section in Recipe.model_fields else {}
    )
    return _DOTTED.fullmatch(name) is not None and re.split(r"[.\[]", key)[0] in within


def load(path: Path, overrides: Sequence[str] = (), ended: bool = False) -> LoadedRecipe:
    """Read and check a recipe; of a run that has `ended` the rows that it names may be gone.

    Raises:
        RecipeErrors: every mistake in it, in the order of the file.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links, and show another name)
    composed = compose(path, overrides)
    if composed.root is None:
        raise RecipeErrors(composed.problems)
    places = dict(_places(composed.root, ()))
    recipe, found = validate(composed.root, places.keys(), composed.problems, composed.complete, ended)
    problems = [*composed.problems, *found]
    if problems:
        raise RecipeErrors(sorted(problems, key=lambda problem: _order(problem, path)))
    return LoadedRecipe(_with_defaults(recipe, path, places.keys()), path, places, composed.files)


def _places(node: Node, path: PathParts) -> Iterator[tuple[str, Location]]:
    for part, child in children(node):
        yield dotted_name((*path, part)), child.place
        yield from _places(child, (*path, part))


def _order(problem: Problem, path: Path) -> tuple[bool, bool, str, int, int]:
    """The recipe itself first, then what it extends, then `--set`."""
    place = problem.place
    return bool(place.setting), place.file != path, str(place.file), place.line, place.column


def _with_defaults(recipe: Recipe, path: Path, written: Any) -> Recipe:
    """Fill in the defaults that depend on the file's name and on other keys; what is written stays as it is."""
    name = recipe.name or _name(path)
    output = recipe.output
    if output.dir is None:
        output = output.model_copy(update={"dir": f"runs/{name}"})
    else:
        output = output.model_copy(update={"dir": os.path.expanduser(output.dir)})  # noqa: PTH111 (it may be `~nobody`)
    train = recipe.train
    if train.steps is not None and "train.epochs" not in written:
        train = train.model_copy(update={"epochs": None})
    return recipe.model_copy(update={"name": name, "output": output, "train": train})


def _name(path: Path) -> str:
    """The file's name, or its folder's where the file is `recipe.yaml`, in the characters that a name may have."""
    stem = path.parent.name if path.stem == "recipe" else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-") or "recipe"
