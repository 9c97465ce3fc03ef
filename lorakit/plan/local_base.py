"""What a run would refuse of the base's files, as far as they lie on this machine; without torch."""

from importlib.util import find_spec
from pathlib import Path

from lorakit.errors import UserError
from lorakit.model.base_files import check_base_files, refuse_missing_tokenizer
from lorakit.model.quantization_config import refuse_irreversible
from lorakit.plan.model_info import ModelInfo, hub_snapshot
from lorakit.recipe.schema import Recipe

_GGUF = b"GGUF"


def check_local_base(recipe: Recipe, complete: bool = True) -> None:
    """Refuse a base model whose files a run would refuse, where they are here.

    Args:
        complete: whether a file that a folder lacks is a fault.

    Raises:
        UserError: a file is missing, damaged or pickled, code is to be run, or the template reads no such variable.
    """
    base, path = recipe.model.base, Path(recipe.model.base)
    snapshot = None if path.is_absolute() else hub_snapshot(base, recipe.model.revision)
    folder = path if path.is_absolute() and path.is_dir() else snapshot
    if recipe.model.template_variables or recipe.model.template_date != "auto":
        _check_template(recipe, folder)
    if path.is_absolute() and path.is_dir():
        check_base_files(path, complete)
        if complete:
            refuse_missing_tokenizer(path)
    elif path.is_absolute():
        _check_gguf(path)
    elif snapshot:
        check_base_files(snapshot, complete=False)


def _check_template(recipe: Recipe, folder: Path | None) -> None:
    """Refuse a variable or a day that the chat template here does not read."""
    from lorakit.data.template_source import (  # 70 ms of imports
        check_template_date,
        check_template_variables,
        read_templates,
        writes_date,
    )

    model = recipe.model
    own = Path(model.chat_template) if model.chat_template else None
    if model.template_variables:
        check_template_variables(folder, own, model.template_variables)
    if model.template_date != "auto" and (templates := read_templates(folder, own)):
        check_template_date(model.template_date, writes_date(templates))


def describe_missing_files(recipe: Recipe) -> str | None:
    """What of the base's files a run would miss, of a base that `check_local_base` takes; None where nothing is."""
    try:
        check_local_base(recipe)
    except UserError as error:
        return f"{error} It is planned all the same; a run would be refused"
    return None


def refuse_unmergeable(recipe: Recipe, info: ModelInfo) -> None:
    """Refuse a recipe that asks for a merged model of weights to which nothing can be added.

    Raises:
        UserError: the quantization of the base's own weights cannot be undone.
    """
    if recipe.output.merged:
        refuse_irreversible(info.stored, recipe.model.base)


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(len(_GGUF))
    if begin != _GGUF:
        raise UserError(f"model.base: {path}: no readable GGUF file: it does not begin as one does. Fetch it again.")
    if not find_spec("gguf"):
        raise UserError(f"model.base: {path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.")
