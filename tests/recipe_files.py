"""What the tests of recipes share: a folder with a small recipe, and the errors of a text."""

from pathlib import Path

from lorakit.recipe.load import LoadedRecipe, RecipeErrors, load

SMALL = """\
model:
  base: org/model
data:
  train: train.jsonl
"""


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    """A recipe in a folder that has the data files it may name."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in ("train.jsonl", "more.jsonl", "eval.jsonl"):
        (folder / data).touch()
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    return load(write(folder, text), overrides)


def errors(folder: Path, text: str, *overrides: str) -> list[str]:
    """The problems of a recipe, without the folder's name; empty when there are none."""
    try:
        load(write(folder, text), overrides)
    except RecipeErrors as error:
        return [str(problem).replace(f"{folder}/", "") for problem in error.problems]
    return []
