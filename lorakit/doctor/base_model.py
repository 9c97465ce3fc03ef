"""Whether a recipe's base model is on this machine, and whether all that a run loads of it is there and known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.doctor.check import DoctorFinding, broken, note, ok
from lorakit.doctor.packages import installed, missing_import
from lorakit.errors import UserError
from lorakit.model.resolve import BUNDLED_MODELS, Base, resolve_base
from lorakit.progress import Silent

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe


def check_base(recipe: "Recipe") -> Iterator[DoctorFinding]:
    """Whether a recipe's base model is here, or can be fetched; of one that is here, each part that a run loads."""
    from huggingface_hub import constants, try_to_load_from_cache

    name, revision = recipe.model.base, recipe.model.revision
    cached = None if Path(name).exists() else try_to_load_from_cache(name, "config.json", revision=revision)
    if name.endswith(".gguf") and not installed("gguf"):
        yield broken("base", f"{name} needs the package gguf", "pip install 'lorakit[gguf]'")
    elif Path(name).is_file():
        yield ok("base", f"{name} is here")
    elif Path(name).is_absolute():
        yield from _check_folder(recipe, Path(name), f"{name} is here")
    elif isinstance(cached, str):
        yield from _check_folder(recipe, Path(cached).parent, f"{name} is in the hub's cache")
    elif name in BUNDLED_MODELS:
        yield ok("base", f"{name} comes from the hub or, without it, from {BUNDLED_MODELS[name].package}")
    elif constants.HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE, or write a local folder as model.base"
        yield broken("base", f"{name} is not here, and HF_HUB_OFFLINE is set", remedy)
    else:
        yield note("base", f"{name} is not here yet: it is fetched from the hub when it is first used")


def _check_folder(recipe: "Recipe", folder: Path, message: str) -> Iterator[DoctorFinding]:
    """The files, the family, the tokenizer and the checkpoint's own quantization, as a run reads them."""
    try:
        resolve_base(str(folder), recipe.model.revision, Silent())
        yield ok("base", message)
    except UserError as error:
        yield broken("base", _text(error), "fetch the model again, or put all its files into the folder")
    try:
        family = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # resolve_base has told it
    if missing := missing_import("torch", "transformers"):
        yield note("base's parts", f"not tried, since {missing} cannot be imported")
        return
    base = Base(recipe.model.base, folder, "as doctor finds it")
    yield _check_family(str(family))
    yield _check_tokenizer(recipe, base)
    yield from _check_quantization(recipe, base)


def _check_family(family: str) -> DoctorFinding:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    library = f"transformers {transformers.__version__}"
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ok("base's family", f"{family}: known to {library}")
    message = f"{family}: {library} has no causal language model of this model_type"
    remedy = "pip install --upgrade transformers, if a newer one knows it; else write another model.base"
    return broken("base's family", message, remedy)


def _check_tokenizer(recipe: "Recipe", base: Base) -> DoctorFinding:
    from lorakit.model.tokenizer import load_tokenizer, quiet_libraries

    quiet_libraries()
    try:
        tokenizer = load_tokenizer(base, recipe.model.chat_template)
    except UserError as error:
        return broken(
            "base's tokenizer", _text(error), "put tokenizer.json and tokenizer_config.json beside the weights"
        )
    template = "with a chat template"
    if not tokenizer.chat_template:
        template = "without a chat template: model.chat_template gives one, where rows are conversations"
    return ok("base's tokenizer", f"{len(tokenizer):,} tokens, {template}")


def _check_quantization(recipe: "Recipe", base: Base) -> Iterator[DoctorFinding]:
    """The quantization that the checkpoint has already, if any."""
    from lorakit.model.quantization_config import missing_packages, refuse_quantization, stored_quantization
    from lorakit.recipe.adapter_kind import effective_model, trains_all

    try:
        stored = stored_quantization(base.folder)
        if stored is None:
            return
        refuse_quantization(stored, base.name, effective_model(recipe), trains_all(recipe.adapter))
    except UserError as error:
        yield broken("base's weights", _text(error), "write another model.base")
        return
    if missing := missing_packages(stored):
        message = f"the weights of {base.name} are {stored.quantization} already, and what loads them is missing"
        yield broken("base's weights", message, f"pip install {' '.join(missing)}")
    else:
        yield ok("base's weights", f"{stored.quantization} on disk, {stored.treatment} in training")


def _text(error: UserError) -> str:
    return str(error).removeprefix("model.base: ")
