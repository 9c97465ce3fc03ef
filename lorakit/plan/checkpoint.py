"""What quantization means for a run, of the checkpoint's own weights and as the recipe asks for it, before loading."""

from dataclasses import dataclass

from lorakit.hardware.machine import Machine
from lorakit.model.quantization_config import describe_savings, missing_packages
from lorakit.plan.memory import DTYPE_BYTES, weight_bytes
from lorakit.plan.model_info import ModelInfo
from lorakit.recipe.schema import Model


@dataclass(frozen=True)
class Checkpoint:
    """The quantization that the weights have on disk, and what follows from it."""

    quantization: str
    treatment: str
    """kept: trained on as stored; dequantized: turned into plain weights while they are loaded."""
    mergeable: bool
    """Whether an adapter can be added to them."""
    missing: tuple[str, ...]
    """Packages that load them and that this machine does not have."""
    description: str


def checkpoint_of(info: ModelInfo, machine: Machine) -> Checkpoint | None:
    """The quantization of a model's checkpoint; None where its weights are plain ones."""
    stored = info.stored
    if stored is None:
        return None
    counted = "trained on and counted as stored, so that its own weights cannot be trained"
    if stored.treatment == "dequantized":
        counted = "dequantized while it is loaded, and counted so"
    missing = missing_packages(stored)
    text = f"{stored.quantization} on disk, {counted}"
    if missing and machine.here:
        text += f"; training is refused here until {' and '.join(missing)} can load it: pip install {' '.join(missing)}"
    elif stored.packages:
        text += f"; the machine needs {' and '.join(stored.packages)} to load it"
    return Checkpoint(stored.quantization, stored.treatment, stored.reversible, missing, text)


def effective_quantization(settings: Model, kind_quantizes: str | None, info: ModelInfo | None) -> tuple[str, str]:
    """The quantization in which the base is really held, and why where the recipe's word does not say it."""
    stored = info.stored if info else None
    if stored and stored.treatment == "kept":
        return stored.quantization, "the checkpoint is quantized already"
    if kind_quantizes:
        return kind_quantizes, "the kind of adapter quantizes"
    if stored:
        return settings.quantization, f"the checkpoint is {stored.quantization}, and is dequantized while it is loaded"
    return settings.quantization, ""


def quantization_line(settings: Model, kind_quantizes: str | None, info: ModelInfo | None) -> str:
    """The sentence of `lorakit check`: the quantization asked for, the one in effect, the share and the bytes saved.

    Args:
        settings: the recipe's model section, its dtype resolved.
        kind_quantizes: the quantization in which the adapter kind itself puts the base, if any.
        info: of the base model; None when it is not on this machine.
    """
    effective, reason = effective_quantization(settings, kind_quantizes, info)
    begin = ""
    if effective != settings.quantization:
        begin = f"{settings.quantization} was asked for, {effective} is used: {reason}. "
    if effective == "none":
        return f"none: {reason or 'the weights as they are'}"
    if info is None:
        return f"{begin}{effective}: the share and the bytes saved are known when the model is here"
    spec = info.spec
    if spec is None or info.stored or effective not in ("q8", "q4", "nf4"):
        return f"{begin}{effective}: the share and the bytes saved are known when the model is loaded"
    width = DTYPE_BYTES[settings.dtype]
    share = sum(weight.size for weight in spec.quantizable) / spec.parameters
    before, after = (weight_bytes(spec, word, settings.double_quant, width) for word in ("none", effective))
    return begin + describe_savings(effective, share, before, after)
