"""What a checkpoint on disk says of its own quantization, read from config.json without loading anything."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import UserError
from lorakit.model.base import Base
from lorakit.recipe.schema import Model


@dataclass(frozen=True)
class Stored:
    """The quantization that a checkpoint brings along."""

    quantization: str
    """Our word where we have one (nf4, q4, q8), else the method's own."""
    treatment: Literal["kept", "dequantized", "unknown"]
    """Trained on as it lies there, turned into plain weights while it is loaded, or not something that we load."""
    reversible: bool
    """Whether its weights can be turned into plain ones, to which an adapter can be added."""
    packages: tuple[str, ...] = ()
    """What has to be installed to load it, besides what lorakit needs anyway."""


# By transformers' word for the method (its quantizers/auto.py); bitsandbytes has words of ours.
_METHODS = {
    "gptq": Stored("gptq", "kept", False, ("optimum", "gptqmodel")),
    "awq": Stored("awq", "kept", False, ("gptqmodel",)),
    "fp8": Stored("fp8", "dequantized", True),
    "mxfp4": Stored("mxfp4", "dequantized", True),
    "mxfp8": Stored("mxfp8", "dequantized", True),
    "compressed-tensors": Stored("compressed-tensors", "dequantized", True, ("compressed-tensors",)),
}


def stored_quantization(folder: Path) -> Stored | None:
    """The quantization of the checkpoint in a folder; None when its weights are plain ones."""
    return quantization_in(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def quantization_in(config: dict[str, Any]) -> Stored | None:
    """The quantization that a config.json names."""
    named = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not named:
        return None
    if named.get("load_in_8bit"):
        return Stored("q8", "kept", True)
    if named.get("load_in_4bit"):
        word = {"nf4": "nf4", "fp4": "q4"}[named.get("bnb_4bit_quant_type", "fp4")]
        return Stored(word, "kept", True)
    method = str(named.get("quant_method", "of an unnamed method"))
    return _METHODS.get(method) or Stored(method, "unknown", False)


def check_quantization(base: Base, settings: Model, trainable: bool = False) -> Stored | None:
    """The quantization that the checkpoint itself has, if any; refuse one that does not go with the settings.

    Raises:
        UserError: it is of a kind that is not trained on, lacks a package, or would be quantized twice.
    """
    stored = stored_quantization(base.folder)
    if stored is None:
        return None
    what = f"the weights of {base.name} are {stored.quantization} already"
    if stored.treatment == "unknown":
        raise UserError(
            f"model.base: {what}, which lorakit does not train on. Give the unquantized model; model.quantization "
            "quantizes it."
        )
    lacking = [name for name in stored.packages if find_spec(name.replace("-", "_")) is None]
    if lacking:
        raise UserError(f"model.base: {what}; loading them needs another package: pip install {' '.join(lacking)}.")
    if settings.quantization != "none":
        raise UserError(
            f"model.quantization: {what} and cannot be put into {settings.quantization}. Write none, and an "
            "adapter.kind that does not quantize: the adapter is then trained on the weights as they are."
        )
    if trainable and stored.treatment == "kept":
        raise UserError(
            f"adapter.kind: none trains the weights themselves, and {what}. Write lora, or give the unquantized model."
        )
    return stored


def check_mergeable(base: Base) -> None:
    """Refuse a checkpoint to whose weights no adapter can be added.

    Raises:
        UserError: its quantization cannot be undone.
    """
    stored = stored_quantization(base.folder)
    if stored and not stored.reversible:
        raise UserError(
            f"model.base: the weights of {base.name} are {stored.quantization}, to which no adapter can be added: "
            "serve the adapter beside them (output.merged: false)."
        )


def quantized_words(quantization: str, share: float, before: float, after: float) -> str:
    """What a quantization does to a model, in one clause; sizes in bytes."""
    return (
        f"{quantization}: {share:.0%} of the parameters are quantized, {_size(after)} instead of {_size(before)} "
        f"(saves {_size(before - after)})"
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.2f} MB"
