"""`lorakit new`: a folder with a recipe, rows or a place for them, and a README; complete, or not there at all."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.atomic_io import atomic_dir
from lorakit.errors import BaseModelError, UserError
from lorakit.recipe.data_files import is_pattern
from lorakit.recipe.did_you_mean import nearest_file
from lorakit.recipe.docs import json_schema
from lorakit.recipe.fields import PathRole
from lorakit.recipe.load import LoadedRecipe, RecipeErrors, load
from lorakit.recipe.paths import absolute_path, relative_path
from lorakit.recipe.problem import quote, show_path
from lorakit.recipe.schema import Model, Recipe
from lorakit.recipe.schema_introspection import accepts, describe, fields, path_role
from lorakit.share.gallery import README, RECIPE, files_of_task, task_folder
from lorakit.share.new_texts import EXAMPLE_ROWS, SCHEMA, SCHEMA_LINE, copied_readme, new_readme, recipe_text, scalar

if TYPE_CHECKING:
    from lorakit.share.row_shape import RowShape

_ROWS = "data/train.jsonl"
_OPTIONS = {"model.base": "--base", "data.train": "--data"}


@dataclass(frozen=True)
class NewTask:
    """A folder that was started: the name of its runs, its base model, its files, what was seen of the rows, and what a
    person has to look at."""

    folder: Path
    name: str
    base: str
    files: list[str]
    task: str | None = None
    shape: "RowShape | None" = None
    notes: list[str] = field(default_factory=list)

    def commands(self) -> list[str]:
        """What to type next, from the working directory."""
        return next_commands(self.folder / RECIPE, self.name)


def next_commands(recipe: Path, name: str) -> list[str]:
    """Check, look at the rows, train, score."""
    from shlex import quote as quoted

    written = quoted(str(recipe))
    return [*(f"lorakit {command} {written}" for command in ("check", "data", "train")), f"lorakit eval runs/{name}"]


def start_recipe(folder: Path, base: str | None, data: Path | None) -> NewTask:
    """Start a folder with a recipe of one's own: for the rows of `data`, else with rows that show what to put there.

    Raises:
        UserError: the folder is not empty or cannot have this name; the base or the rows cannot be read.
    """
    name = _check_folder(folder)
    values: dict[str, Any] = {"name": name, "model.base": _base_reference(base, folder), "data.train": _ROWS}
    values["data.eval"], shape = 0.2, None
    if data is not None:
        from lorakit.share.row_shape import look_at_rows, read_section

        rows = _existing_rows(data)
        shape = look_at_rows(rows)
        values["data.train"] = relative_path(str(rows), Path(os.path.abspath(folder)))  # noqa: PTH100 (as it is named)
        values |= {f"data.{key}": value for key, value in read_section(shape).items()}
        if not shape.conversations:  # there is no answer to compare
            values["evaluate.metrics"] = []
        elif shape.calls_tools:
            values["evaluate.metrics"] = ["tool-calls"]
    notes = shape.notes if shape else []
    with _new_folder(folder) as draft:
        if shape is None:
            (draft / _ROWS).parent.mkdir()
            (draft / _ROWS).write_text("".join(json.dumps(row) + "\n" for row in EXAMPLE_ROWS), encoding="utf-8")
        (draft / RECIPE).write_text(recipe_text(values, notes), encoding="utf-8")
        readme = new_readme(name, next_commands(Path(RECIPE), name), values["data.train"], shape is not None)
        (draft / README).write_text(readme, encoding="utf-8")
        files, _ = _complete(draft)
    return NewTask(folder, name, values["model.base"], files, None, shape, notes)


def start_from_gallery(folder: Path, task: str, base: str | None) -> NewTask:
    """Start a folder with a task of the gallery: its recipe under the new name, its rows, its README.

    Raises:
        UserError: the folder is not empty or cannot have this name; there is no such task, or no such base.
    """
    name, source = _check_folder(folder), task_folder(task)
    loaded, paths = files_of_task(source)
    values = {"name": name} | ({} if base is None else {"model.base": _base_reference(base, folder)})
    with _new_folder(folder) as draft:
        for path in paths:
            copy = draft / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        (draft / RECIPE).write_text(_rewrite(loaded, values), encoding="utf-8")
        page = (source / README).read_text(encoding="utf-8")
        (draft / README).write_text(
            copied_readme(page, task, name, next_commands(Path(RECIPE), name)), encoding="utf-8"
        )
        files, recipe = _complete(draft)
    return NewTask(folder, name, values.get("model.base", recipe.model.base), files, task)


def _rewrite(loaded: LoadedRecipe, values: dict[str, str]) -> str:
    """The text of a recipe with other values for some of its keys, and everything else as it is."""
    lines = loaded.path.read_text(encoding="utf-8").splitlines()
    added = []
    for key, value in values.items():
        place = loaded.places.get(key)
        if place is not None and place.file == loaded.path:
            line, at = lines[place.line - 1], place.column - 1
            comment = re.search(r"\s+#.*$", line[at:])
            lines[place.line - 1] = line[:at] + scalar(value) + (comment[0] if comment else "")
        elif key == "name":
            added.append(f"name: {scalar(value)}")
        else:
            raise UserError(f"--base: the task names its base in {place}. Leave --base out, and change it there.")
    schema = [SCHEMA_LINE]
    return "\n".join(schema + added + [line for line in lines if "yaml-language-server" not in line]) + "\n"


def _check_folder(folder: Path) -> str:
    """The name of the runs of a new folder; a `UserError` where it cannot be one, or something is there."""
    annotation, name = fields(Recipe)["name"], folder.name
    if not accepts(annotation, name) or name == "..":
        near = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")
        remedy = f"Write for example {near}." if near else "Write for example my-task."
        raise UserError(
            f"NAME: {quote(str(folder))} does not end in {describe(annotation).removesuffix(', or null')}. {remedy}"
        )
    for parent in folder.absolute().parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise UserError(f"{show_path(parent)}: is a file, and cannot hold the new folder. Give another NAME.")
    _refuse_existing(folder)
    return name


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        if folder.is_symlink() or not folder.is_dir():
            raise UserError(f"{show_path(folder)}: exists, and is not a folder. Give another NAME.")
        if any(folder.iterdir()):
            raise UserError(
                f"{show_path(folder)}: exists, and is not empty. Nothing is overwritten: give another NAME."
            )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A draft that becomes the folder, or, where something has come there meanwhile, nothing."""
    with atomic_dir(folder, first_wins=True) as draft:
        yield draft
        made = draft.stat()
    if not os.path.samestat(made, folder.stat()):
        _refuse_existing(folder)


def _complete(draft: Path) -> tuple[list[str], Recipe]:
    """Put the schema beside the recipe for editors, and see that the recipe can be read: its files, and what it says.

    Raises:
        UserError: a rule of recipes is against what was given.
    """
    (draft / SCHEMA).write_text(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        recipe = load(draft / RECIPE).recipe
    except RecipeErrors as error:
        problems = [(_OPTIONS.get(one.path, one.path), one.reason, one.remedy) for one in error.problems]
        raise UserError(" ".join(f"{path}: {reason}. {remedy}" for path, reason, remedy in problems)) from error
    _check_base(recipe)
    return sorted(str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()), recipe


def _check_base(recipe: Recipe) -> None:
    """Refuse, as a `UserError`, a base on this machine that `lorakit check` would refuse."""
    from lorakit.plan import model_info

    try:
        model_info.refuse_by_config(recipe, model_info.find_model_info(recipe.model.base, recipe.model.revision))
        model_info.check_local_base(recipe)
    except BaseModelError as error:
        raise UserError(f"--base: {error}") from error


def default_base() -> str:
    """The base model of a new recipe where none is given."""
    return _base_role().example


def _base_role() -> PathRole:
    role = path_role(fields(Model)["base"])
    assert role is not None
    return role


def _base_reference(base: str | None, folder: Path) -> str:
    """What the recipe has as `model.base`: a hub id as it is, a path relative to the new folder."""
    if base is None:
        return default_base()
    if not base.strip():
        raise UserError(f"--base: is empty. Write for example {default_base()}, or leave it out.")
    path = absolute_path(base, _base_role(), Path.cwd())
    if path is not None and not os.path.exists(path):  # noqa: PTH110 (Path.exists raises for what it may not look at)
        near = nearest_file(Path(path))
        remedy = f"Did you mean {show_path(Path(path).with_name(near))}?" if near else "Write a hub id, or a folder."
        raise UserError(f"--base: {quote(base)} does not exist. {remedy}")
    return base if path is None else relative_path(path, Path(os.path.abspath(folder)))  # noqa: PTH100


def _existing_rows(data: Path) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(data)))  # noqa: PTH100, PTH111 (as it is named)
    if not path.exists() and not is_pattern(path):
        near = nearest_file(path)
        remedy = f"Did you mean {show_path(path.with_name(near))}?" if near else "Write the path of a file with rows."
        hint = " A data set of the hub is written into data.train, in a folder that is started without --data."
        raise UserError(f"--data: {show_path(data)} does not exist. {remedy}{'' if near else hint}")
    return path
