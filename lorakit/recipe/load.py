"""The front door of recipes: a file, what it extends and `--set` -> one checked Recipe; and back to YAML."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import UserError
from lorakit.recipe.compose import compose
from lorakit.recipe.problem import LocatedError, Location, PathParts, Problem, dotted_name
from lorakit.recipe.problem import RecipeErrors as RecipeErrors
from lorakit.recipe.schema import Recipe
from lorakit.recipe.to_yaml import to_yaml as to_yaml
from lorakit.recipe.validate import validate
from lorakit.recipe.yaml_reader import Node, children


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
            name = place = str(error).partition(":")[0]
            if not _is_key(name):
                raise
            while place and place not in self.places:  # of a key that has its default, where its section is
                place = place[: max(place.rfind("."), place.rfind("["), 0)]
            location = self.places[place] if place else Location(self.path)
            raise LocatedError(location, name, str(error)) from error


def _is_key(name: str) -> bool:
    """Whether a dotted name is that of a key in a section: `train.steps` is, a file train.jsonl is not."""
    section, _, key = name.partition(".")
    model = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
    is_dotted = re.fullmatch(r"[a-z_]+(\.[a-z_]+|\[\d+\])*", name) is not None
    return is_dotted and re.split(r"[.\[]", key)[0] in getattr(model, "model_fields", {})


def load(path: Path, overrides: Sequence[str] = (), ended: bool = False) -> LoadedRecipe:
    """Read and check a recipe; of a run that has `ended` the rows that it names may be gone.

    Raises:
        RecipeErrors: every mistake in it, in the order of the file.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links, and show another name)
    composition = compose(path, overrides)
    if composition.root is None:
        raise RecipeErrors(composition.problems)
    places = dict(_places(composition.root, ()))
    recipe, problems = validate(composition, places.keys(), ended)
    if problems:

        def order(problem: Problem) -> tuple[bool, bool, str, int, int]:
            """The recipe itself first, then what it extends, then `--set`."""
            place = problem.place
            return bool(place.setting), place.file != path, str(place.file), place.line, place.column

        raise RecipeErrors(sorted(problems, key=order))
    return LoadedRecipe(_with_defaults(recipe, path, places.keys()), path, places, tuple(map(Path, composition.nodes)))


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
