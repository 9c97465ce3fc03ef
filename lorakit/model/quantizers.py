"""Quantizations: the recipe's model section, dtype -> transformers' quantization configuration, or None."""

from typing import TYPE_CHECKING, Any

from lorakit.registry import QUANTIZERS

if TYPE_CHECKING:
    from lorakit.recipe.schema import Model  # which reads this table's words


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
