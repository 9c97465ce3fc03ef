"""Whether a recipe's base model is on this machine, and whether all that a run loads of it is there and known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.doctor.finding import CheckResult
from lorakit.doctor.packages import import_error, installed
from lorakit.errors import UserError
from lorakit.model.bundled_models import BUNDLED_MODELS
from lorakit.model.resolve import Base, resolve_base
from lorakit.progress import Silent

if TYPE_CHECKING:
    from lorakit.recipe.schema import Recipe

_AGAIN = "fetch the model again, or put all its files into the folder"


def base(recipe: "Recipe") -> Iterator[CheckResult]:
    """Whether a recipe's base model is here, or can be fetched; of one that is here, each part that a run loads."""
    from huggingface_hub import constants, try_to_load_from_cache

    name, revision = recipe.model.base, recipe.model.revision
    cached = None if Path(name).exists() else try_to_load_from_cache(name, "config.json", revision=revision)
    if name.endswith(".gguf") and not installed("gguf"):
        yield CheckResult("base", "broken", f"{name} needs the package gguf", "pip install 'lorakit[gguf]'")
    elif Path(name).is_file():
        yield CheckResult("base", "ok", f"{name} is here")
    elif Path(name).is_absolute():
        yield from _parts(recipe, Path(name), f"{name} is here")
    elif isinstance(cached, str):
        yield from _parts(recipe, Path(cached).parent, f"{name} is in the hub's cache")
    elif name in BUNDLED_MODELS:
        yield CheckResult(
            "base", "ok", f"{name} comes from the hub or, without it, from {BUNDLED_MODELS[name].package}"
        )
    elif constants.HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE, or write a local folder as model.base"
        yield CheckResult("base", "broken", f"{name} is not here, and HF_HUB_OFFLINE is set", remedy)
    else:
        yield CheckResult("base", "note", f"{name} is not here yet: it is fetched from the hub when it is first used")


def _parts(recipe: "Recipe", folder: Path, here: str) -> Iterator[CheckResult]:
    """The files, the family, the tokenizer and the checkpoint's own quantization, as a run asks for them."""
    try:
        resolve_base(str(folder), recipe.model.revision, Silent())
        yield CheckResult("base", "ok", here)
    except UserError as error:
        yield CheckResult("base", "broken", _said(error), _AGAIN)
    config = _config(folder)
    if config is None:
        return
    lacking = next((package for package in ("torch", "transformers") if import_error(package)), None)
    if lacking:
        yield CheckResult("base's parts", "note", f"not tried, since {lacking} cannot be imported")
        return
    found = Base(recipe.model.base, folder, "as doctor finds it")
    yield _family(str(config["model_type"]))
    yield _tokenizer(recipe, found)
    yield from _quantization(recipe, found)


def _config(folder: Path) -> dict[str, Any] | None:
    """What config.json says; None where `resolve_base` refuses it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and "model_type" in config else None


def _family(family: str) -> CheckResult:
    """Whether transformers has a causal language model of this family."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CheckResult("base's family", "ok", f"{family}: known to transformers {transformers.__version__}")
    said = f"{family}: transformers {transformers.__version__} knows no causal language model of this model_type"
    remedy = "pip install --upgrade transformers, where a newer one knows it; else write another model.base"
    return CheckResult("base's family", "broken", said, remedy)


def _tokenizer(recipe: "Recipe", found: Base) -> CheckResult:
    from lorakit.model.tokenizer import load_tokenizer, quiet_libraries

    quiet_libraries()
    try:
        tokenizer = load_tokenizer(found, recipe.model.chat_template)
    except UserError as error:
        remedy = "put tokenizer.json and tokenizer_config.json beside the weights"
        return CheckResult("base's tokenizer", "broken", _said(error), remedy)
    size = f"{len(tokenizer):,} tokens"
    if not tokenizer.chat_template:
        remedy = "model.chat_template gives one, where rows are conversations"
        return CheckResult("base's tokenizer", "ok", f"{size}, without a chat template: {remedy}")
    return CheckResult("base's tokenizer", "ok", f"{size}, with a chat template")


def _quantization(recipe: "Recipe", found: Base) -> Iterator[CheckResult]:
    """The quantization that the checkpoint has already, where it has one."""
    from lorakit.model.quantization_config import missing_packages, refuse_quantization, stored_quantization
    from lorakit.recipe.adapter_kind import effective_model, trains_all

    try:
        stored = stored_quantization(found.folder)
        if stored is None:
            return
        refuse_quantization(stored, found.name, effective_model(recipe), trains_all(recipe.adapter))
    except UserError as error:
        yield CheckResult("base's weights", "broken", _said(error), "write another model.base")
        return
    lacking = missing_packages(stored)
    if lacking:
        said = f"the weights of {found.name} are {stored.quantization} already, and what loads them is missing"
        yield CheckResult("base's weights", "broken", said, f"pip install {' '.join(lacking)}")
    else:
        yield CheckResult("base's weights", "ok", f"{stored.quantization} on disk, {stored.treatment} in training")


def _said(error: UserError) -> str:
    return str(error).removeprefix("model.base: ")
