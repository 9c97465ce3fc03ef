"""A config.json -> the model's spec, for the families whose layers are known exactly. No torch, no weights.

The layers are those of transformers' modeling files; a test compares every family with the model that transformers
makes of the same config.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.errors import UserError
from lorakit.model.config_values import read_bool, read_size
from lorakit.model.spec import ACTIVATIONS, ModelSpec
from lorakit.model.weight_spec import WeightSpec

HEAD_TIED = "it is one weight with the embeddings, which adapter.train_modules can train"
HEAD = "it is the output head, which adapter.train_modules can train"


@dataclass(frozen=True)
class _Family:
    """What the blocks of a family hold."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: bool = False
    biases: Literal["none", "configured", "query, key and value", "all"] = "none"
    mlp: Literal["gated", "packed", "up and down", "two layers", "experts"] = "gated"
    packed_attention: bool = False
    """Query, key and value in one layer."""
    closing: str = "o_proj"
    """What attention's last layer is called."""
    layer_norm: bool = False
    final_norm: str = "norm"
    tied: bool = False
    """Whether embeddings and head are one where the config does not say."""
    width: str = "intermediate_size"
    """The key of the feed-forward width."""
    beside: int = 0
    """Numbers of a block that belong to no layer named here."""
    capped: bool = False
    """Whether attention's scores and the logits are soft-capped where the config does not say."""
    activation: str = ""
    """The activation where the config names none, if it is one that transformers writes out in several operations."""
    needs: tuple[str, ...] = ()
    """Further keys for which transformers' class has a number of its own where the config leaves them out."""


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a config, checked."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    inner: int
    head_width: int
    key_value: int
    experts: int
    experts_used: int


_KEY_VALUE = ("num_key_value_heads",)
_HEADS = ("num_key_value_heads", "head_dim")
_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

_FAMILIES = {
    "llama": _Family(biases="configured"),
    "mistral": _Family(needs=_KEY_VALUE),
    "mixtral": _Family(mlp="experts", needs=(*_KEY_VALUE, "num_experts_per_tok")),
    "qwen2": _Family(biases="query, key and value", needs=_KEY_VALUE),
    "qwen3": _Family(head_norms=True, biases="configured", needs=_HEADS),
    "qwen3_moe": _Family(
        head_norms=True,
        biases="configured",
        mlp="experts",
        width="moe_intermediate_size",
        needs=(*_KEY_VALUE, "num_experts_per_tok"),
    ),
    "smollm3": _Family(biases="configured", tied=True, needs=_KEY_VALUE),
    "phi3": _Family(packed_attention=True, mlp="packed"),
    "phi": _Family(
        norms=("input_layernorm",),
        biases="all",
        mlp="two layers",
        closing="dense",
        layer_norm=True,
        final_norm="final_layernorm",
        activation="gelu_new",
    ),
    "gemma": _Family(biases="configured", tied=True, needs=_HEADS),
    "gemma2": _Family(norms=_FOUR_NORMS, biases="configured", tied=True, capped=True, needs=_HEADS),
    "gemma3_text": _Family(norms=_FOUR_NORMS, head_norms=True, biases="configured", tied=True, needs=_HEADS),
    "apertus": _Family(
        norms=("attention_layernorm", "feedforward_layernorm"),
        head_norms=True,
        biases="configured",
        mlp="up and down",
        beside=2,
        activation="xielu",
    ),
}


def is_known_family(config: dict[str, Any]) -> bool:
    """Whether a config is of a family that is counted here, so that its keys are known to mean what they say."""
    return str(config.get("model_type")) in _FAMILIES


def spec_from_config(config: dict[str, Any]) -> ModelSpec | None:
    """The spec of the model of a config.json; None where its family is not known here, or a size is missing.

    Raises:
        UserError: a value of a family that is known here is damaged.
    """
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or _is_unusual(config):
        return None
    sizes = _sizes_of(config, family)
    return _build_spec(config, family, sizes) if sizes else None


def _sizes_of(config: dict[str, Any], family: _Family) -> _Sizes | None:
    """The sizes of a family's config; None where one is missing that only transformers' class knows."""
    hidden, layers, heads = (
        read_size(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    vocabulary, inner, used = (read_size(config, key) for key in ("vocab_size", family.width, "num_experts_per_tok"))
    experts = read_size(config, "num_local_experts") or read_size(config, "num_experts")
    if not (hidden and layers and heads and vocabulary and inner) or any(key not in config for key in family.needs):
        return None
    if family.mlp == "experts" and not experts:
        return None
    width, groups = read_size(config, "head_dim"), read_size(config, "num_key_value_heads") or heads
    if width is None and hidden % heads:
        raise _indivisible("hidden_size", hidden, "num_attention_heads", heads)
    if heads % groups:
        raise _indivisible("num_attention_heads", heads, "num_key_value_heads", groups)
    width = width or hidden // heads
    return _Sizes(hidden, layers, heads, vocabulary, inner, width, groups * width, experts or 1, used or 1)


def _indivisible(key: str, value: int, other: str, parts: int) -> UserError:
    return UserError(
        f"model.base: config.json: {key} is {value}, which is not a multiple of {other}, {parts}. "
        "Fetch the model again."
    )


def _is_unusual(config: dict[str, Any]) -> bool:
    """What some configs of these families switch on, and what is not counted here."""
    if config.get("qk_layernorm") or config.get("mlp_only_layers") or config.get("attn_logit_softcapping") == "learned":
        return True
    return config.get("decoder_sparse_step", 1) != 1


def _build_spec(config: dict[str, Any], family: _Family, sizes: _Sizes) -> ModelSpec:
    hidden, vocabulary, said = sizes.hidden, sizes.vocabulary, read_bool(config, "tie_word_embeddings")
    tied = family.tied if said is None else said
    biased = (bool(read_bool(config, "attention_bias")), bool(read_bool(config, "mlp_bias")))
    modules = {"model.embed_tokens": vocabulary * hidden}
    weights: list[WeightSpec] = []
    for number in range(sizes.layers):
        prefix = f"model.layers.{number}."
        for weight, bias in _block(family, sizes, *biased):
            placed = WeightSpec(prefix + weight.path, weight.sublayer, **_shape(weight))
            weights.append(placed)
            owner = placed.path.rsplit(".", 1)[0] if placed.fused else placed.path
            modules[owner] = modules.get(owner, 0) + placed.size + (placed.outer if bias else 0)
        modules |= {prefix + name: count for name, count in _others(family, sizes)}
    modules[f"model.{family.final_norm}"] = hidden * (2 if family.layer_norm else 1)
    modules["lm_head"] = vocabulary * hidden + (vocabulary if family.biases == "all" else 0)
    dead = HEAD_TIED if tied else HEAD
    beside = "not part of the language model"
    weights.append(
        WeightSpec("lm_head", "", is_head=True, skip_reason=beside, unadaptable=dead, outer=vocabulary, inner=hidden)
    )
    return ModelSpec(
        model_type=config["model_type"],
        hidden=hidden,
        vocabulary=vocabulary,
        tied=tied,
        layers=sizes.layers,
        heads=sizes.heads,
        key_value=sizes.key_value,
        weights=tuple(weights),
        modules=modules,
        embeddings="model.embed_tokens",
        norms=len(family.norms),
        head_norms=family.head_norms,
        layer_norm=family.layer_norm,
        experts_used=sizes.experts_used,
        activation=ACTIVATIONS.get(
            str(config.get("hidden_activation") or config.get("hidden_act") or family.activation), 1
        ),
        soft_capped=bool(config.get("attn_logit_softcapping", family.capped)),
        logits_capped=bool(config.get("final_logit_softcapping", family.capped)),
        shared={"lm_head": vocabulary * hidden} if tied else {},
    )


def _shape(weight: WeightSpec) -> dict[str, Any]:
    return {key: getattr(weight, key) for key in ("fused", "outer", "inner", "experts")}


def _block(family: _Family, sizes: _Sizes, attention_bias: bool, mlp_bias: bool) -> Iterator[tuple[WeightSpec, bool]]:
    """The weights of one block in the model's order, and whether each has a bias."""
    hidden, inner, biases = sizes.hidden, sizes.inner, family.biases
    query, key = sizes.heads * sizes.head_width, sizes.key_value
    attention = biases == "all" or (biases == "configured" and attention_bias)
    opening = attention or biases == "query, key and value"
    if family.packed_attention:
        yield _layer("self_attn.o_proj", "attention", hidden, query), False
        yield _layer("self_attn.qkv_proj", "attention", query + 2 * key, hidden), False
    else:
        for name, outer in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            yield _layer(f"self_attn.{name}", "attention", outer, hidden), opening
        yield _layer(f"self_attn.{family.closing}", "attention", hidden, query), attention
    bias = biases == "all" or (biases == "configured" and mlp_bias)
    if family.mlp == "experts":
        for name, outer, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            path = f"mlp.experts.{name}"
            yield WeightSpec(path, "mlp", fused=True, experts=sizes.experts, outer=outer, inner=width), False
        return
    opened = {
        "gated": [("gate_proj", inner), ("up_proj", inner)],
        "packed": [("gate_up_proj", 2 * inner)],
        "up and down": [("up_proj", inner)],
        "two layers": [("fc1", inner)],
    }[family.mlp]
    for name, outer in opened:
        yield _layer(f"mlp.{name}", "mlp", outer, hidden), bias
    yield _layer("mlp.fc2" if family.mlp == "two layers" else "mlp.down_proj", "mlp", hidden, inner), bias


def _layer(path: str, half: str, outer: int, inner: int) -> WeightSpec:
    return WeightSpec(path, half, outer=outer, inner=inner)


def _others(family: _Family, sizes: _Sizes) -> Iterator[tuple[str, int]]:
    """The modules of one block that are no linear layers, and their numbers."""
    for name in family.norms:
        yield name, sizes.hidden * (2 if family.layer_norm else 1)
    if family.head_norms:
        yield "self_attn.q_norm", sizes.head_width
        yield "self_attn.k_norm", sizes.head_width
    if family.mlp == "experts":
        yield "mlp.gate", sizes.experts * sizes.hidden
    if family.beside:
        yield "mlp.act_fn", family.beside
