"""What the adapter's kind means for the rest of a recipe: how the base is held, and which keys nothing would read."""

from pathlib import Path
from typing import Any

from lorakit.recipe.fields import entry_names, entry_settings
from lorakit.recipe.schema import Adapter, Model, Recipe
from lorakit.registry import ADAPTERS, AdapterSpec

_PATTERNS = ("rank_overrides", "alpha_overrides", "train_modules")
INHERITED = ("kind", "rank", "alpha", "targets", "exclude", "layers", *_PATTERNS)
"""The keys of `adapter` that an adapter which is trained on decides."""


def adapter_spec(adapter: Adapter) -> AdapterSpec:
    """The table's entry of the recipe's kind; lora's for a mapping that names none (another error)."""
    return ADAPTERS[next(iter(entry_names(adapter.kind)), "lora")]


def kind_settings(adapter: Adapter) -> Any:
    """The kind's own settings; None where it has none."""
    return entry_settings(ADAPTERS, adapter.kind)


def trains_all(adapter: Adapter) -> bool:
    """Whether the weights themselves are trained (full fine-tuning), and there is no adapter."""
    return adapter_spec(adapter).name == "none"


def initial_adapter(adapter: Adapter) -> str | None:
    """The run or the folder whose adapter is trained on."""
    source: str | None = getattr(adapter, "from")
    return source


def adapter_folder(source: Path) -> Path:
    """The folder of the adapter that `adapter.from` means: of a run, its adapter."""
    return source / "adapter" if (source / "adapter" / "adapter_config.json").is_file() else source


def effective_model(recipe: Recipe) -> Model:
    """The model section with the quantization that really holds: some kinds quantize the base themselves."""
    own = adapter_spec(recipe.adapter).quantizes
    return recipe.model.model_copy(update={"quantization": own}) if own else recipe.model


def unread_keys(recipe: Recipe) -> dict[str, str]:
    """Dotted names of keys that nothing would read in this recipe -> why."""
    kind, quantization = adapter_spec(recipe.adapter), effective_model(recipe).quantization
    unread = dict.fromkeys(kind.refuses, f"adapter.kind {kind.name} does not take it")
    if initial_adapter(recipe.adapter):
        reason = "the adapter that adapter.from names has its own"
        unread = dict.fromkeys([f"adapter.{key}" for key in INHERITED], reason)
    if quantization in ("none", "q8"):
        unread["model.double_quant"] = f"it would be ignored, since model.quantization is {quantization}"
    if recipe.train.batch_tokens is not None:
        unread["train.batch_size"] = "train.batch_tokens says how large a step is"
    if recipe.train.schedule == "constant":
        unread["train.min_rate"] = "the schedule constant does not fall"
    return unread
