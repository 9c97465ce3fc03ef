"""A side of a diff: a run or a recipe, with its keys, the files of its rows, and what `auto` chose. Without torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorakit.data.sources import sources_of
from lorakit.errors import UserError
from lorakit.recipe.adapter_kind import unread_keys
from lorakit.recipe.fields import is_split
from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.paths import is_path
from lorakit.recipe.problem import one_line, show_path
from lorakit.recipe.schema import Recipe, Source
from lorakit.run_dir import CLEARED, Run, missing_run
from lorakit.share.row_diff import hash_files, locate_rows

Side = Literal["train", "eval"]
SIDES: tuple[Side, Side] = ("train", "eval")
# Where a run lies, and not what it is.
PLACES = ("output.dir",)


@dataclass(frozen=True)
class DiffSide:
    """A run or a recipe. `auto`: the keys that the recipe of a run left open, with what was chosen; a recipe that has
    not run still says `auto`. `unchecked`: keys that cannot be read here."""

    given: Path
    recipe: Recipe
    run: Run | None = None
    manifest: dict[str, Any] | None = None
    auto: Mapping[str, Any] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "run" if self.run else "recipe"

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys that nothing reads in this recipe, such as the rank of a full fine-tuning."""
        return tuple(unread_keys(self.recipe))

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every key of the recipe by its dotted path; of sources what they say, each by its number where they are
        several."""
        others = self.recipe.model_dump(exclude={"data": {"train", "eval"}})
        keys = {key: value for key, value in flatten(others) if key not in PLACES}
        for side in SIDES:
            keys |= dict(_flat_sources(f"data.{side}", getattr(self.recipe.data, side)))
        return keys

    @cached_property
    def files(self) -> dict[str, str] | str:
        """The sha256 of each data file by its path: those that the run read, or those that lie there now. In words why
        they are not known."""
        if self.manifest is not None:
            return {str(path): str(sha256) for path, sha256 in self.manifest["data"]["files"].items()}
        try:
            return hash_files([source for side in SIDES for source in self.sources(side)])
        except UserError as error:
            return f"{self.given}: {str(error).rstrip('.')}"

    def sources(self, side: Side) -> list[Source]:
        """The sources of one side; none where the held-out rows are a fraction of the others."""
        written = getattr(self.recipe.data, side)
        return [] if written is None or is_split(written) else sources_of(self.recipe.data, written)

    def locate(self, side: Side) -> list[Source]:
        """The same with paths where the files lie now; UserError where they are gone or are not what a run read."""
        if self.run is None or isinstance(self.files, str):
            return self.sources(side)
        return locate_rows(self.sources(side), self.run, self.files)


def open_side(given: Path) -> DiffSide:
    """A run's folder or a recipe; UserError where it is neither, or is damaged. Its rows may be gone."""
    if not given.is_dir():
        if not given.exists() and given.suffix not in (".yaml", ".yml"):
            raise missing_run(given)
        return DiffSide(given, load(given, ended=True).recipe)
    run = Run(given)
    manifest = run.read_manifest()
    if manifest.get("status") == CLEARED:
        raise UserError(f"{given}: this run was cleared for another one, which did not begin: nothing is left of it.")
    recorded = manifest.get("auto")
    choices = [one for one in recorded if isinstance(one, dict)] if isinstance(recorded, list) else []
    auto = {str(one.get("path")): one.get("value") for one in choices}
    try:
        return DiffSide(given, load(run.recipe, ended=True).recipe, run, manifest, auto)
    except RecipeErrors:  # what the adapter began from may be gone by now, and a compiler
        recipe = load(run.recipe, ["adapter.from=null", "train.compile=off"], ended=True).recipe
        return DiffSide(given, recipe, run, manifest, auto, ("adapter.from", "train.compile"))


def _flat_sources(name: str, written: Any) -> Iterator[tuple[str, Any]]:
    """The keys of `data.train` or `data.eval`: of a source its path, or whatever it says besides its defaults."""
    several = written if isinstance(written, list) else [written]
    for number, one in enumerate(several):
        key = f"{name}[{number}]" if several[1:] else name
        says = one.model_dump(exclude_defaults=True) if isinstance(one, Source) else {"path": one}
        yield from flatten(says, key) if len(says) > 1 else [(key, says["path"])]


def align_sources(keys: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Keys in which a single source is the first one, where the other side has several."""
    aligned = dict(keys)
    for name in (f"data.{side}" for side in SIDES):
        if any(key.startswith(f"{name}[") for key in other):
            own = [key for key in keys if key == name or key.startswith(f"{name}.")]
            aligned |= {f"{name}[0]{key.removeprefix(name)}": aligned.pop(key) for key in own}
    return aligned


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping and no list of mappings, by its dotted path."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from flatten(item, f"{path}[{number}]")
    else:
        yield path, value


def show_value(value: Any) -> str:
    """A value of a recipe as a table shows it; a path from the working directory."""
    if isinstance(value, str):
        return show_path(Path(value)) if is_path(value) else one_line(value)
    return one_line(json.dumps(value, ensure_ascii=False, default=str))
