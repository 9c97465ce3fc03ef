"""Quantizations: those that a recipe asks for, and a checkpoint's own, read from its config.json without loading it."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.amounts import decimal_bytes, percent
from lorakit.errors import BaseModelError, UserError
from lorakit.model.config_values import damaged_value, read_json, read_typed
from lorakit.registry import QUANTIZERS

if TYPE_CHECKING:
    from lorakit.model.resolve import Base
    from lorakit.recipe.schema import Model  # which reads this table's words


@dataclass(frozen=True)
class CheckpointQuantization:
    """The quantization of a checkpoint on disk."""

    quantization: str  # our word where we have one (nf4, q4, q8), else the method's own
    treatment: Literal["kept", "dequantized", "unknown"]  # trained on as it is, dequantized on loading, not supported
    reversible: bool  # whether its weights can be dequantized, so that an adapter can be added to them
    packages: tuple[str, ...] = ()  # what loads it, besides what lorakit needs anyway
    bits: int | None = None  # of a weight, where the method has several widths and the checkpoint names one


# By transformers' word for the method (its quantizers/auto.py); bitsandbytes has words of ours.
_METHODS = {
    "gptq": CheckpointQuantization("gptq", "kept", False, ("optimum", "gptqmodel")),
    "awq": CheckpointQuantization("awq", "kept", False, ("gptqmodel",)),
    "fp8": CheckpointQuantization("fp8", "dequantized", True),
    "mxfp4": CheckpointQuantization("mxfp4", "dequantized", True),
    "mxfp8": CheckpointQuantization("mxfp8", "dequantized", True),
    "compressed-tensors": CheckpointQuantization("compressed-tensors", "dequantized", True, ("compressed-tensors",)),
}


def stored_quantization(folder: Path) -> CheckpointQuantization | None:
    """The quantization of the checkpoint in a folder; None where its weights are plain ones."""
    return parse_quantization(read_json(folder / "config.json"))


def parse_quantization(config: dict[str, Any]) -> CheckpointQuantization | None:
    """The quantization in the content of a config.json; UserError where it is damaged."""
    parts = (config, read_typed(config, "text_config", dict) or {})
    own = (read_typed(part, "quantization_config", dict) for part in parts)
    settings: dict[str, Any] | None = next((part for part in own if part is not None), None)
    if settings is None:
        return None
    if read_typed(settings, "load_in_8bit", bool):
        return CheckpointQuantization("q8", "kept", True)
    if read_typed(settings, "load_in_4bit", bool):
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise damaged_value("bnb_4bit_quant_type", kind, "nf4 or fp4")
        return CheckpointQuantization("nf4" if kind == "nf4" else "q4", "kept", True)
    method = str(settings.get("quant_method", "of an unnamed method"))
    stored = _METHODS.get(method) or CheckpointQuantization(method, "unknown", False)
    return replace(stored, bits=read_typed(settings, "bits", int)) if method in ("gptq", "awq") else stored


def check_quantization(base: "Base", settings: "Model", trainable: bool = False) -> CheckpointQuantization | None:
    """The quantization of the checkpoint itself, if any; UserError where it does not go with the settings
    (`refuse_quantization`), or a package that loads it is missing."""
    stored = stored_quantization(base.folder)
    if stored is None:
        return None
    refuse_quantization(stored, base.name, settings, trainable)
    if missing := missing_packages(stored):
        reason = f"the weights of {base.name} are {stored.quantization} already; loading them needs another package"
        raise BaseModelError(f"{reason}: pip install {' '.join(missing)}.")
    return stored


def missing_packages(stored: CheckpointQuantization) -> tuple[str, ...]:
    """The packages that load a checkpoint and are not installed."""
    return tuple(name for name in stored.packages if find_spec(name.replace("-", "_")) is None)


def refuse_quantization(stored: CheckpointQuantization, name: str, settings: "Model", trainable: bool) -> None:
    """Refuse a checkpoint whose method is not supported, that would be quantized twice, or cannot be trained itself.
    `name` is the recipe's for the base; `settings` have the quantization into which the kind of adapter puts it;
    `trainable` says whether the weights themselves are trained."""
    what = f"the weights of {name} are {stored.quantization} already"
    if stored.treatment == "unknown":
        remedy = "Give the unquantized model; model.quantization quantizes it."
        raise BaseModelError(f"{what}, which lorakit does not train on. {remedy}")
    if settings.quantization != "none":
        remedy = "Write none, and an adapter.kind that does not quantize: the weights are then trained on as they are."
        raise UserError(f"model.quantization: {what} and cannot be put into {settings.quantization}. {remedy}")
    if trainable and stored.treatment == "kept":
        remedy = "Write lora, or give the unquantized model."
        raise UserError(f"adapter.kind: none trains the weights themselves, and {what}. {remedy}")


def refuse_irreversible(stored: CheckpointQuantization | None, name: str) -> None:
    """Refuse a quantization that cannot be undone: no adapter can be added to such weights."""
    if stored and not stored.reversible:
        reason = f"the weights of {name} are {stored.quantization}, to which no adapter can be added"
        raise BaseModelError(f"{reason}: serve the adapter beside them (output.merged: false).")


def describe_savings(quantization: str, share: float, before: float, after: float) -> str:
    """What a quantization does to a model, in one clause; `before` and `after` are bytes."""
    saved = f"{decimal_bytes(after)} instead of {decimal_bytes(before)} (saves {decimal_bytes(before - after)})"
    return f"{quantization}: {percent(share)} of the parameters are quantized, {saved}"


@QUANTIZERS.register("none")
def none(settings: "Model", compute_dtype: Any) -> Any:
    """The weights as they are."""
    return None


@QUANTIZERS.register("q8")
def q8(settings: "Model", compute_dtype: Any) -> Any:
    """8-bit integers with outliers apart (LLM.int8, Dettmers et al., arXiv 2208.07339) by bitsandbytes."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _four_bits(settings: "Model", compute_dtype: Any, kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


@QUANTIZERS.register("q4")
def q4(settings: "Model", compute_dtype: Any) -> Any:
    """4-bit floating point (FP4) by bitsandbytes; NF4 loses less."""
    return _four_bits(settings, compute_dtype, "fp4")


@QUANTIZERS.register("nf4")
def nf4(settings: "Model", compute_dtype: Any) -> Any:
    """4-bit NormalFloat (QLoRA, Dettmers et al., arXiv 2305.14314) by bitsandbytes."""
    return _four_bits(settings, compute_dtype, "nf4")
