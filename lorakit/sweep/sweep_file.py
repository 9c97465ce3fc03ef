"""The file of a sweep: the recipe that it extends, what is tried for which keys, and how. Without torch and Optuna."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.load import LoadedRecipe, load, setting_node
from lorakit.recipe.problem import Location, PathParts, Problem, RecipeErrors, dotted_name, one_line, quote
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import annotation_at, section_of
from lorakit.recipe.suggestions import for_unknown_key
from lorakit.recipe.yaml_reader import Node, children, plain, read_file
from lorakit.share.diff_side import flatten
from lorakit.sweep.space import MOST_VALUES, RANGES, Choices, Space, grid, is_range, parse_space

Search = Literal["grid", "random", "tpe"]
Pruning = Literal["none", "median", "successive-halving", "hyperband"]
_SETTINGS = ("search", "prune", "trials", "budget", "seed")
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)")
_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400}
_TRIALS = 20


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run. `fixed`: keys that all trials share; `budget`: seconds after which no trial begins."""

    path: Path
    name: str
    recipe: Path
    spaces: dict[str, Space]
    fixed: dict[str, Any] = field(default_factory=dict)
    search: Search = "grid"
    prune: Pruning = "successive-halving"
    trials: int = _TRIALS
    budget: float | None = None
    seed: int = 0

    def overrides(self, values: Mapping[str, Any]) -> list[Node]:
        """What a trial with these values puts over the recipe; paths in it begin where the sweep's file lies."""
        return [setting_node(key, value, self.path) for key, value in {**self.fixed, **values}.items()]

    def load(self, values: Mapping[str, Any], folder: Path | None = None) -> LoadedRecipe:
        """The recipe of a trial with these values, into `folder`; RecipeErrors where they do not go together."""
        place = [setting_node("output.dir", str(folder.absolute()), self.path)] if folder else []
        return load(self.recipe, [*self.overrides(values), *place])

    def identity(self) -> dict[str, Any]:
        """What must stay the same while its folder is gone on with: more trials and another budget may be asked for.
        The recipe is what it says with all that it extends, wherever it lies."""
        recipe = self.load({key: _samples(space)[0] for key, space in self.spaces.items()}).recipe
        own = tuple(f"{key}." for key in (*self.spaces, *self.fixed, "name", "output.dir"))
        written = flatten(recipe.model_dump(mode="json"))
        return {
            "recipe": {key: value for key, value in written if not f"{key}.".startswith(own)},
            "spaces": {key: repr(space) for key, space in self.spaces.items()},
            "fixed": self.fixed,
            "search": self.search,
            "prune": self.prune,
            "seed": self.seed,
        }


def load_sweep(path: Path) -> Sweep:
    """Read and check a sweep with the recipe that it extends. RecipeErrors: every mistake, with its place."""
    path = path.absolute()
    root, problems = read_file(path, Location(path))
    if root is None or not isinstance(root.value, dict):
        remedy = "Write extends: RECIPE, and keys with the values to try."
        raise RecipeErrors(problems or [Problem(Location(path, 1, 1), "", "", "this is not a sweep", remedy)])
    reader = _Reader(path, root, problems)
    sweep = reader.read()
    if reader.problems:
        raise RecipeErrors(sorted(reader.problems, key=lambda one: one.place.sort_key))
    assert sweep is not None
    return sweep


class _Reader:
    """Goes through the file once, and collects what is wrong with it."""

    def __init__(self, path: Path, root: Node, problems: list[Problem]) -> None:
        self.path, self.root, self.problems = path, root, list(problems)
        self.spaces: dict[str, tuple[Space, Node]] = {}
        self.fixed: dict[str, tuple[Any, Node]] = {}

    def read(self) -> Sweep | None:
        top = dict(children(self.root))
        extends, name, settings = (top.pop(key, None) for key in ("extends", "name", "sweep"))
        recipe = self._recipe(extends)
        for key, node in top.items():
            self._read_key(tuple(str(key).split(".")), node)
        values = self._settings(settings)
        if name and not isinstance(name.value, str | int | float):
            self._complain(name, ("name",), "the name of a sweep is a text", "Write for example name: rates.")
        if not self.spaces and not self.problems:
            remedy = "Write for example train.learning_rate: [1e-4, 3e-4, 1e-3]."
            self._complain(self.root, (), "no key has several values: there is nothing to try", remedy)
        spaces = {key: space for key, (space, _) in self.spaces.items()}
        if self.problems or recipe is None:
            return None
        values["search"] = values.get("search") or self._search(spaces)
        plain_name = plain(name) if name else self.path.parent.name if self.path.stem == "sweep" else self.path.stem
        sweep = Sweep(
            self.path,
            re.sub(r"[^A-Za-z0-9._-]+", "-", str(plain_name)).strip("._-") or "sweep",
            recipe,
            spaces,
            {key: value for key, (value, _) in self.fixed.items()},
            **values,
        )
        self._check_search(sweep, settings)
        self._check_values(sweep)
        if sweep.search == "grid":
            spaces = {key: Choices(space.finite or ()) for key, space in spaces.items()}
        return replace(sweep, spaces=spaces)

    def _complain(self, node: Node, path: PathParts, reason: str, remedy: str, shown: bool = True) -> None:
        value = quote(plain(node)) if shown and path else ""
        self.problems.append(Problem(node.place, dotted_name(path), value, reason, remedy))

    def _recipe(self, node: Node | None) -> Path | None:
        if node is None or not isinstance(node.value, str):
            self._complain(node or self.root, ("extends",), "a sweep extends one recipe", "Write extends: recipe.yaml.")
            return None
        path = (self.path.parent / Path(node.value).expanduser()).resolve()
        if not path.is_file():
            self._complain(node, ("extends",), "there is no such file", "Correct the path of the recipe.")
            return None
        return path

    def _read_key(self, path: PathParts, node: Node) -> None:
        """A key of the recipe with values to try, with one value for all trials, or with keys below it."""
        annotation = annotation_at(Recipe, path)
        if annotation is None:
            remedy, _ = for_unknown_key(path, plain(node))
            self._complain(node, path, "a recipe has no such key", remedy, shown=False)
            return
        if path == ("output", "dir"):
            self._complain(node, path, "each trial has a folder of its own", "Remove the line; see --output.")
            return
        value, name = plain(node), dotted_name(path)
        if name in self.spaces or name in self.fixed:
            self._complain(node, path, "the key is there twice", "Leave one out.")
        elif isinstance(value, list) or is_range(value):
            space = parse_space(value)
            if isinstance(space, str):
                self._complain(node, path, space, f"Write a list of values, or one of {', '.join(RANGES)}.")
            else:
                self.spaces[name] = space, node
        elif isinstance(value, dict) and section_of(annotation) and len(path) < 2:
            for key, child in children(node):
                self._read_key((*path, *str(key).split(".")), child)
        else:
            self.fixed[name] = value, node

    def _settings(self, node: Node | None) -> dict[str, Any]:
        if node is None:
            return {}
        if not isinstance(node.value, dict):
            self._complain(node, ("sweep",), "expected a mapping", f"It takes {', '.join(_SETTINGS)}.")
            return {}
        values: dict[str, Any] = {}
        for key, child in children(node):
            path, value = ("sweep", key), plain(child)
            parsed = _parse_setting(str(key), value)
            if isinstance(parsed, _Mistake):
                self._complain(child, path, parsed.reason, parsed.remedy)
            else:
                values[str(key)] = parsed.value
        return values

    def _search(self, spaces: Mapping[str, Space]) -> Search:
        return "grid" if all(space.finite for space in spaces.values()) else "tpe"

    def _check_search(self, sweep: Sweep, settings: Node | None) -> None:
        for key, (space, node) in self.spaces.items():
            if sweep.search == "grid" and space.finite is None:
                remedy = "Add points, such as points: 5, or write sweep: {search: tpe}."
                self._complain(node, tuple(key.split(".")), "a grid has no end of values in a range", remedy)
        trials = dict(children(settings)).get("trials") if settings and isinstance(settings.value, dict) else None
        if sweep.search == "grid" and trials:
            remedy = "Remove the line, or write search: random."
            self._complain(trials, ("sweep", "trials"), "a grid has a trial for each combination", remedy)
        if sweep.search == "grid" and not self.problems:
            count = 1
            for space in sweep.spaces.values():
                count *= len(space.finite or ())
            if count > MOST_VALUES:
                remedy = "Write sweep: {search: random, trials: 50}."
                self._complain(self.root, (), f"a grid of {count:,} trials", remedy)

    def _check_values(self, sweep: Sweep) -> None:
        """Each value alone, with the others at their first: what a recipe refuses is said before anything is run."""
        if self.problems:
            return
        first = {key: _samples(space)[0] for key, space in sweep.spaces.items()}
        try:
            recipe = sweep.load(first).recipe
        except RecipeErrors as error:
            self._adopt(error, {})
            return
        if recipe.data.eval is None:
            remedy = "Write data.eval: 0.1, a tenth of the rows, into the recipe."
            reason = "trials are ranked by their held-out loss, and there are no held-out rows"
            self._complain(self.root, ("data", "eval"), reason, remedy, shown=False)
        for key, (space, node) in self.spaces.items():
            for value in _samples(space)[1:]:
                try:
                    sweep.load({**first, key: value})
                except RecipeErrors as error:
                    self._adopt(error, {key: node})

    def _adopt(self, error: RecipeErrors, places: Mapping[str, Node]) -> None:
        """Problems of the recipe with the values of this file, at the place of the value."""
        nodes = places or {key: node for key, (_, node) in {**self.fixed, **self.spaces}.items()}
        for problem in error.problems:
            node = next((one for key, one in nodes.items() if problem.path.startswith(key)), None)
            adopted = replace(problem, place=node.place) if node else problem
            if adopted not in self.problems:
                self.problems.append(adopted)


def _samples(space: Space) -> list[Any]:
    """The values of a space, or the ends of a range without end."""
    if space.finite:
        return list(space.finite)
    low, high = space.low, space.high  # type: ignore[union-attr]
    return [int(low), int(high)] if space.is_whole else [low, high]  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Mistake:
    reason: str
    remedy: str


@dataclass(frozen=True)
class _Parsed:
    value: Any


def _parse_setting(key: str, value: Any) -> _Parsed | _Mistake:
    words = {"search": get_args(Search), "prune": get_args(Pruning)}
    if key in words:
        if value in words[key]:
            return _Parsed(value)
        near = nearest(str(value), words[key])
        return _Mistake("no such word", f"Did you mean {near}?" if near else f"Write one of {', '.join(words[key])}.")
    if key in ("trials", "seed"):
        least = 1 if key == "trials" else 0
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return _Parsed(value)
        return _Mistake(f"expected a whole number from {least} on", f"Write {key}: 20.")
    if key == "budget":
        seconds = parse_duration(str(value))
        if seconds is None:
            return _Mistake("expected a time", "Write for example budget: 2h, 90min or 45s.")
        return _Parsed(seconds)
    near = nearest(key, _SETTINGS)
    return _Mistake("there is no such key", f"Did you mean {near}?" if near else f"There are {', '.join(_SETTINGS)}.")


def parse_duration(text: str) -> float | None:
    """Seconds of a time such as `2h`, `90min` or `1.5 d`; None of anything else."""
    match = _BUDGET.fullmatch(text.strip())
    return float(match[1]) * _SECONDS[match[2]] if match and float(match[1]) > 0 else None


def combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """The trials of a grid, in their order."""
    return grid(sweep.spaces)


def describe_values(values: Mapping[str, Any]) -> str:
    """`learning_rate 0.001, rank 8`."""
    return ", ".join(f"{key.rpartition('.')[2]} {one_line(json.dumps(value))}" for key, value in values.items())
