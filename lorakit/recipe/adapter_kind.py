"""What the adapter's kind means for the rest of a recipe: how the base is held, and which keys nothing would read."""

from pathlib import Path
from typing import Any

from lorakit.recipe.fields import entry_names, entry_settings
from lorakit.recipe.schema import Adapter, Model, Recipe
from lorakit.registry import ADAPTERS, AdapterSpec

UNQUANTIZED_OR_8_BIT = ("none", "q8")
_SHAPE = ("kind", "rank", "alpha", "targets", "exclude", "layers")
INHERITED = (*_SHAPE, "rank_overrides", "alpha_overrides", "train_modules")
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
    kind, source = adapter_spec(recipe.adapter), initial_adapter(recipe.adapter)
    refused = () if source else kind.refuses
    unread = dict.fromkeys(refused, f"adapter.kind {kind.name} does not take it")
    if source:
        unread |= dict.fromkeys(
            [f"adapter.{key}" for key in INHERITED], "the adapter that adapter.from names has its own"
        )
    quantization = effective_model(recipe).quantization
    if quantization in UNQUANTIZED_OR_8_BIT:
        unread["model.double_quant"] = f"it would be ignored, since model.quantization is {quantization}"
    return unread
