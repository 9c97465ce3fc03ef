"""What a checkpoint on disk says of its own quantization, read from config.json without loading anything."""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lorakit.amounts import percent
from lorakit.errors import UserError
from lorakit.model.config_values import damaged_value, read_bool, read_mapping, read_size
from lorakit.model.resolve import Base
from lorakit.recipe.schema import Model


@dataclass(frozen=True)
class CheckpointQuantization:
    """The quantization that a checkpoint brings along."""

    quantization: str
    """Our word where we have one (nf4, q4, q8), else the method's own."""
    treatment: Literal["kept", "dequantized", "unknown"]
    """Trained on as it lies there, turned into plain weights while it is loaded, or not something that we load."""
    reversible: bool
    """Whether its weights can be turned into plain ones, to which an adapter can be added."""
    packages: tuple[str, ...] = ()
    """What has to be installed to load it, besides what lorakit needs anyway."""
    bits: int | None = None
    """The bits of a weight, where the method has several widths and the checkpoint names one."""


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
    """The quantization of the checkpoint in a folder; None when its weights are plain ones.

    Raises:
        UserError: what its config.json says of it is damaged.
    """
    return parse_quantization(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def parse_quantization(config: dict[str, Any]) -> CheckpointQuantization | None:
    """The quantization that a config.json names.

    Raises:
        UserError: what it says of it is damaged.
    """
    named = read_mapping(config, "quantization_config")
    if named is None:
        named = read_mapping(read_mapping(config, "text_config") or {}, "quantization_config")
    if named is None:
        return None
    if read_bool(named, "load_in_8bit"):
        return CheckpointQuantization("q8", "kept", True)
    if read_bool(named, "load_in_4bit"):
        kind = named.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise damaged_value("bnb_4bit_quant_type", kind, "nf4 or fp4")
        return CheckpointQuantization("nf4" if kind == "nf4" else "q4", "kept", True)
    method = str(named.get("quant_method", "of an unnamed method"))
    stored = _METHODS.get(method) or CheckpointQuantization(method, "unknown", False)
    return replace(stored, bits=read_size(named, "bits")) if method in ("gptq", "awq") else stored


def check_quantization(base: Base, settings: Model, trainable: bool = False) -> CheckpointQuantization | None:
    """The quantization that the checkpoint itself has, if any; refuse one that does not go with the settings.

    Raises:
        UserError: it is refused (`refuse_quantization`), or a package is missing that loads it.
    """
    stored = stored_quantization(base.folder)
    if stored is None:
        return None
    refuse_quantization(stored, base.name, settings, trainable)
    lacking = missing_packages(stored)
    if lacking:
        what = _what(stored, base.name)
        raise UserError(f"model.base: {what}; loading them needs another package: pip install {' '.join(lacking)}.")
    return stored


def missing_packages(stored: CheckpointQuantization) -> tuple[str, ...]:
    """Those of the packages that load a checkpoint which are not installed."""
    return tuple(name for name in stored.packages if find_spec(name.replace("-", "_")) is None)


def refuse_quantization(stored: CheckpointQuantization, name: str, settings: Model, trainable: bool) -> None:
    """Refuse a checkpoint whose own quantization does not go with the settings, on whatever machine.

    Args:
        name: what the recipe calls the base model.
        settings: the model section, with the quantization into which the kind of adapter puts the base.
        trainable: whether the weights themselves are trained.

    Raises:
        UserError: it is of a kind that is not trained on, would be quantized twice, or cannot be trained itself.
    """
    what = _what(stored, name)
    if stored.treatment == "unknown":
        raise UserError(
            f"model.base: {what}, which lorakit does not train on. Give the unquantized model; model.quantization "
            "quantizes it."
        )
    if settings.quantization != "none":
        raise UserError(
            f"model.quantization: {what} and cannot be put into {settings.quantization}. Write none, and an "
            "adapter.kind that does not quantize: the adapter is then trained on the weights as they are."
        )
    if trainable and stored.treatment == "kept":
        raise UserError(
            f"adapter.kind: none trains the weights themselves, and {what}. Write lora, or give the unquantized model."
        )


def _what(stored: CheckpointQuantization, name: str) -> str:
    return f"the weights of {name} are {stored.quantization} already"


def check_mergeable(base: Base) -> None:
    """Refuse a checkpoint to whose weights no adapter can be added.

    Raises:
        UserError: its quantization cannot be undone.
    """
    refuse_irreversible(stored_quantization(base.folder), base.name)


def refuse_irreversible(stored: CheckpointQuantization | None, name: str) -> None:
    """Refuse a quantization that cannot be undone: no adapter can be added to such weights."""
    if stored and not stored.reversible:
        raise UserError(
            f"model.base: the weights of {name} are {stored.quantization}, to which no adapter can be added: "
            "serve the adapter beside them (output.merged: false)."
        )


def describe_savings(quantization: str, share: float, before: float, after: float) -> str:
    """What a quantization does to a model, in one clause; sizes in bytes."""
    return (
        f"{quantization}: {percent(share)} of the parameters are quantized, {_size(after)} instead of {_size(before)} "
        f"(saves {_size(before - after)})"
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.2f} MB"
