"""The gallery: complete tasks, each a recipe with its rows and a README. A checkout has it in `recipes/`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.fields import is_split
from lorakit.recipe.load import LoadedRecipe, load
from lorakit.recipe.paths import input_paths
from lorakit.recipe.schema import Data

RECIPE, README = "recipe.yaml", "README.md"


@dataclass(frozen=True)
class GalleryTask:
    """A task of the gallery: its name, what its README says first, how many rows it has on each side, its base."""

    name: str
    summary: str
    train_rows: int
    eval_rows: int
    base: str


def gallery_folder() -> Path:
    """Where the tasks are: in the wheel beside lorakit's modules, in a checkout beside the package."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "gallery", package.parent / "recipes") if path.is_dir())


def task_names() -> list[str]:
    """The names of all tasks."""
    return sorted(path.parent.name for path in gallery_folder().glob(f"*/{RECIPE}"))


def task_folder(name: str) -> Path:
    """The folder of a task; a `UserError` where there is none of this name."""
    names = task_names()
    if name in names:
        return gallery_folder() / name
    near = nearest(name, names, parts=True)
    remedy = f"Did you mean {near}?" if near else f"It has {', '.join(names)}."
    raise UserError(f"--from: the gallery has no task {name!r}. {remedy} lorakit new --list shows it.")


def gallery_tasks() -> Iterator[GalleryTask]:
    """Every task, its rows counted."""
    for name in task_names():
        folder = gallery_folder() / name
        recipe = load(folder / RECIPE).recipe
        held_out = None if is_split(recipe.data.eval) else recipe.data.eval
        summary = first_sentence((folder / README).read_text(encoding="utf-8"))
        train, evaluation = (_count_rows(recipe.data, written) for written in (recipe.data.train, held_out))
        yield GalleryTask(name, summary, train, evaluation, recipe.model.base)


def _count_rows(section: Data, written: Any) -> int:
    from lorakit.data.readers import files_in, read_file
    from lorakit.data.sources import is_file, sources_of

    sources = sources_of(section, written) if written is not None else []
    files = [file for source in sources if is_file(source) for file in files_in(Path(source.path))]
    return sum(1 for file in files for _ in read_file(file))


def first_sentence(page: str) -> str:
    """The first sentence of a Markdown page below its heading; empty where it has none."""
    text = " ".join(re.sub(r"^#.*$", "", page, flags=re.MULTILINE).strip().partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0]


def files_of_task(folder: Path) -> tuple[LoadedRecipe, list[Path]]:
    """A task's recipe, and the files of its folder that are the task: the README, the recipe with what it extends and
    what it reads. What built the rows is not among them."""
    loaded = load(folder / RECIPE)
    read = {Path(path).resolve() for path in (*loaded.files, *input_paths(loaded.recipe))}
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    return loaded, [path for path in inside if path.resolve() in read or path == folder / README]
