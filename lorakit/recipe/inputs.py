"""What a recipe is made from on disk: the files and folders that no run may delete while it reads them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.recipe.adapter_kind import adapter_folder, initial_adapter
from lorakit.recipe.data_files import data_files, is_pattern
from lorakit.recipe.paths import is_path
from lorakit.recipe.schema import Recipe


def input_paths(recipe: Recipe) -> set[Path]:
    """Base model, adapter, templates, schemas and every data file, as far as they are paths that exist."""
    named = {Path(text) for text in _texts(recipe.model_dump(exclude={"output"})) if is_path(text) and "\0" not in text}
    found = {path for path in named if not is_pattern(path) and path.exists()}
    source = initial_adapter(recipe.adapter)
    if source:
        found = found - {Path(source)} | {adapter_folder(Path(source))}
    base = Path(recipe.model.base)
    folders = {path for path in named - {base} if is_pattern(path) or path.is_dir()}
    return found.union(*(set(data_files(folder)) for folder in folders if is_pattern(folder) or folder in found))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
