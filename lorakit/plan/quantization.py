"""What quantization saves, told before a model is loaded: from the sizes in its config.json alone.

Parameters are counted for families whose layers are known exactly: grouped-query attention and a gated MLP in each.
"""

from dataclasses import dataclass
from typing import Literal

from lorakit.model.stored import quantized_words
from lorakit.plan.facts import ModelFacts
from lorakit.recipe.schema import Model

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, and rows of weight matrices, over all layers."""

    parameters: int
    """All; tied embeddings once."""
    quantizable: int
    """Those in the weights of linear layers, the output head excepted: what bitsandbytes quantizes."""
    rows: int
    """The rows of these weights: int8 has one scale for each."""


@dataclass(frozen=True)
class _Family:
    """What the layers of a family hold besides their matrices (transformers' modeling files)."""

    norms: int = 2
    head_norms: bool = False
    biases: Literal["none", "as configured", "query, key and value"] = "none"
    tied: bool = False
    """Whether embeddings and head are one where the config does not say."""


_FAMILIES = {
    "llama": _Family(biases="as configured"),
    "mistral": _Family(),
    "qwen2": _Family(biases="query, key and value"),
    "qwen3": _Family(head_norms=True, biases="as configured"),
    "smollm3": _Family(biases="as configured", tied=True),
    "phi3": _Family(),
    "gemma": _Family(biases="as configured", tied=True),
    "gemma2": _Family(norms=4, biases="as configured", tied=True),
    "gemma3_text": _Family(norms=4, head_norms=True, biases="as configured", tied=True),
}


def counts_of(facts: ModelFacts) -> Counts | None:
    """The counts of a model; None where its config or its family's layers are not known."""
    family, hidden = _FAMILIES.get(facts.model_type), facts.hidden_size
    if family is None or not (facts.layers and facts.intermediate_size and facts.query_size and facts.key_value_size):
        return None
    if not facts.vocabulary_size:
        return None
    inner, query, key = facts.intermediate_size, facts.query_size, facts.key_value_size
    shapes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    matrices, rows = sum(out * width for out, width in shapes), sum(out for out, _ in shapes)
    biases = 0
    if family.biases == "query, key and value":
        biases = query + 2 * key
    elif family.biases == "as configured":
        biases = facts.attention_bias * (query + 2 * key + hidden) + facts.mlp_bias * (2 * inner + hidden)
    norms = family.norms * hidden
    if family.head_norms:
        norms += 2 * query // (facts.heads or 1)
    tied = family.tied if facts.tied is None else facts.tied
    embeddings = facts.vocabulary_size * hidden * (1 if tied else 2)
    parameters = facts.layers * (matrices + biases + norms) + hidden + embeddings
    return Counts(parameters, facts.layers * matrices, facts.layers * rows)


def quantized_bytes(counts: Counts, quantization: str, double_quant: bool, dtype: str) -> tuple[float, float, float]:
    """The share of parameters that a quantization takes, and the bytes of all weights before and after.

    In 4 bits a scale in float32 stands for 64 weights, and is itself one byte and a 256th of a float32 when it is
    quantized too (QLoRA, arXiv 2305.14314).
    """
    plain = DTYPE_BYTES[dtype]
    if quantization == "q8":
        taken = counts.quantizable + 4.0 * counts.rows
    else:
        taken = counts.quantizable * (0.5 + ((1 + 4 / 256) if double_quant else 4) / 64)
    before = counts.parameters * plain
    after = (counts.parameters - counts.quantizable) * plain + taken
    return counts.quantizable / counts.parameters, before, after


def effective_quantization(settings: Model, kind_quantizes: str | None, facts: ModelFacts | None) -> tuple[str, str]:
    """The quantization in which the base is really held, and why where the recipe's word does not say it."""
    stored = facts.stored if facts else None
    if stored and stored.treatment == "kept":
        return stored.quantization, "the checkpoint is quantized already"
    if kind_quantizes:
        return kind_quantizes, "the kind of adapter quantizes"
    if stored:
        return settings.quantization, f"the checkpoint is {stored.quantization}, and is dequantized while it is loaded"
    return settings.quantization, ""


def quantization_sentence(settings: Model, kind_quantizes: str | None, facts: ModelFacts | None) -> str:
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
    counts = counts_of(facts)
    if counts is None or stored or effective not in ("q8", "q4", "nf4"):
        return f"{asked}{effective}: the share and the bytes saved are known when the model is loaded"
    share, before, after = quantized_bytes(counts, effective, settings.double_quant, settings.dtype)
    return asked + quantized_words(effective, share, before, after)
