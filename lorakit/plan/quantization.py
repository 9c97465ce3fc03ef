"""What quantization saves, told before a model is loaded: from the sizes in its config.json alone."""

from lorakit.model.quantization_config import describe_savings
from lorakit.plan.memory import DTYPE_BYTES, weight_bytes
from lorakit.plan.model_info import ModelInfo
from lorakit.recipe.schema import Model


def effective_quantization(settings: Model, kind_quantizes: str | None, facts: ModelInfo | None) -> tuple[str, str]:
    """The quantization in which the base is really held, and why where the recipe's word does not say it."""
    stored = facts.stored if facts else None
    if stored and stored.treatment == "kept":
        return stored.quantization, "the checkpoint is quantized already"
    if kind_quantizes:
        return kind_quantizes, "the kind of adapter quantizes"
    if stored:
        return settings.quantization, f"the checkpoint is {stored.quantization}, and is dequantized while it is loaded"
    return settings.quantization, ""


def quantization_sentence(settings: Model, kind_quantizes: str | None, facts: ModelInfo | None) -> str:
    """What `lorakit check` says of quantization: asked for, in effect, the share quantized and the bytes saved.

    Args:
        settings: the recipe's model section, its dtype settled.
        kind_quantizes: the quantization in which the adapter kind itself puts the base, if any.
        facts: of the base model; None when it is not on this machine.
    """
    stored = facts.stored if facts else None
    effective, reason = effective_quantization(settings, kind_quantizes, facts)
    if effective != settings.quantization:
        asked = f"{settings.quantization} was asked for, {effective} is used: {reason}. "
    else:
        asked = ""
    if effective == "none":
        return f"none: {reason or 'the weights as they are'}"
    if facts is None:
        return f"{asked}{effective}: the share and the bytes saved are known when the model is here"
    spec = facts.spec
    if spec is None or stored or effective not in ("q8", "q4", "nf4"):
        return f"{asked}{effective}: the share and the bytes saved are known when the model is loaded"
    width = DTYPE_BYTES[settings.dtype]
    share = sum(weight.size for weight in spec.quantizable) / spec.parameters
    before, after = (weight_bytes(spec, word, settings.double_quant, width) for word in ("none", effective))
    return asked + describe_savings(effective, share, before, after)
