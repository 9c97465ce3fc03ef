"""A config.json -> the model's skeleton, for the families whose layers are known exactly. No torch, no weights.

The layers are those of transformers' modeling files; a test compares every family with the model that transformers
makes of the same config.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.model.skeleton import ACTIVATIONS, Skeleton
from lorakit.model.weight import Weight

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


_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

_FAMILIES = {
    "llama": _Family(biases="configured"),
    "mistral": _Family(),
    "mixtral": _Family(mlp="experts"),
    "qwen2": _Family(biases="query, key and value"),
    "qwen3": _Family(head_norms=True, biases="configured"),
    "qwen3_moe": _Family(head_norms=True, biases="configured", mlp="experts", width="moe_intermediate_size"),
    "smollm3": _Family(biases="configured", tied=True),
    "phi3": _Family(packed_attention=True, mlp="packed"),
    "phi": _Family(
        norms=("input_layernorm",),
        biases="all",
        mlp="two layers",
        closing="dense",
        layer_norm=True,
        final_norm="final_layernorm",
    ),
    "gemma": _Family(biases="configured", tied=True),
    "gemma2": _Family(norms=_FOUR_NORMS, biases="configured", tied=True),
    "gemma3_text": _Family(norms=_FOUR_NORMS, head_norms=True, biases="configured", tied=True),
    "apertus": _Family(
        norms=("attention_layernorm", "feedforward_layernorm"),
        head_norms=True,
        biases="configured",
        mlp="up and down",
        beside=2,
    ),
}


def counted(config: dict[str, Any]) -> Skeleton | None:
    """The skeleton of the model of a config.json; None where its family is not known here, or a size is missing."""
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or _is_unusual(config):
        return None
    sizes = [config.get(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")]
    width = config.get(family.width)
    if not all(isinstance(size, int) and size > 0 for size in [*sizes, width]):
        return None
    return _skeleton(config, family)


def _is_unusual(config: dict[str, Any]) -> bool:
    """What some configs of these families switch on, and what is not counted here."""
    if config.get("qk_layernorm") or config.get("mlp_only_layers") or config.get("attn_logit_softcapping") == "learned":
        return True
    return config.get("decoder_sparse_step", 1) != 1


def _skeleton(config: dict[str, Any], family: _Family) -> Skeleton:
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    vocabulary, said = config["vocab_size"], config.get("tie_word_embeddings")
    tied = family.tied if said is None else bool(said)
    head_width = config.get("head_dim") or hidden // heads
    key_value = (config.get("num_key_value_heads") or heads) * head_width
    modules = {"model.embed_tokens": vocabulary * hidden}
    weights: list[Weight] = []
    for number in range(layers):
        prefix = f"model.layers.{number}."
        for weight, bias in _block(config, family, heads * head_width, key_value):
            placed = Weight(prefix + weight.path, weight.half, **_sizes(weight))
            weights.append(placed)
            owner = placed.path.rsplit(".", 1)[0] if placed.fused else placed.path
            modules[owner] = modules.get(owner, 0) + placed.size + (placed.outer if bias else 0)
        modules |= {prefix + name: size for name, size in _others(config, family, head_width)}
    modules[f"model.{family.final_norm}"] = hidden * (2 if family.layer_norm else 1)
    modules["lm_head"] = vocabulary * hidden + (vocabulary if family.biases == "all" else 0)
    dead = HEAD_TIED if tied else HEAD
    beside = "not part of the language model"
    weights.append(Weight("lm_head", "", is_head=True, aside=beside, dead=dead, outer=vocabulary, inner=hidden))
    return Skeleton(
        model_type=config["model_type"],
        hidden=hidden,
        vocabulary=vocabulary,
        tied=tied,
        layers=layers,
        heads=heads,
        key_value=key_value,
        weights=tuple(weights),
        modules=modules,
        embeddings="model.embed_tokens",
        norms=len(family.norms),
        head_norms=family.head_norms,
        layer_norm=family.layer_norm,
        experts_used=config.get("num_experts_per_tok") or 1,
        activation=ACTIVATIONS.get(str(config.get("hidden_activation") or config.get("hidden_act")), 1),
        shared={"lm_head": vocabulary * hidden} if tied else {},
    )


def _sizes(weight: Weight) -> dict[str, Any]:
    return {key: getattr(weight, key) for key in ("fused", "outer", "inner", "experts")}


def _block(config: dict[str, Any], family: _Family, query: int, key: int) -> Iterator[tuple[Weight, bool]]:
    """The weights of one block in the model's order, and whether each has a bias."""
    hidden, inner, biases = config["hidden_size"], config[family.width], family.biases
    attention = biases == "all" or (biases == "configured" and bool(config.get("attention_bias")))
    opening = attention or biases == "query, key and value"
    if family.packed_attention:
        yield _layer("self_attn.o_proj", "attention", hidden, query), False
        yield _layer("self_attn.qkv_proj", "attention", query + 2 * key, hidden), False
    else:
        for name, outer in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            yield _layer(f"self_attn.{name}", "attention", outer, hidden), opening
        yield _layer(f"self_attn.{family.closing}", "attention", hidden, query), attention
    bias = biases == "all" or (biases == "configured" and bool(config.get("mlp_bias")))
    if family.mlp == "experts":
        count = config.get("num_local_experts") or config["num_experts"]
        for name, outer, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            path = f"mlp.experts.{name}"
            yield Weight(path, "mlp", fused=True, experts=count, outer=outer, inner=width), False
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


def _layer(path: str, half: str, outer: int, inner: int) -> Weight:
    return Weight(path, half, outer=outer, inner=inner)


def _others(config: dict[str, Any], family: _Family, head_width: int) -> Iterator[tuple[str, int]]:
    """The modules of one block that are no linear layers, and their numbers."""
    for name in family.norms:
        yield name, config["hidden_size"] * (2 if family.layer_norm else 1)
    if family.head_norms:
        yield "self_attn.q_norm", head_width
        yield "self_attn.k_norm", head_width
    if family.mlp == "experts":
        yield "mlp.gate", (config.get("num_local_experts") or config["num_experts"]) * config["hidden_size"]
    if family.beside:
        yield "mlp.act_fn", family.beside
