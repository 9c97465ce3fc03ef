"""A config.json -> the model's spec, for the families whose layers are known exactly. No torch, no weights.

The layers are those of transformers' modeling files; a test compares every family with the model that transformers
makes of the same config.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.errors import UserError
from lorakit.model.config_values import read_typed
from lorakit.model.spec import ACTIVATIONS, OUTSIDE, TIED_HEAD, UNTIED_HEAD, ModelSpec, WeightSpec

Layers = dict[str, tuple[str, str]]
"""Path in a block, in the model's order -> rows and columns of the matrix, by the names in `_sizes_of`."""

_KEY_AND_VALUE: Layers = dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), ("key_value", "hidden"))
_QUERY_KEY_VALUE: Layers = {"self_attn.q_proj": ("query", "hidden"), **_KEY_AND_VALUE}
_ATTENTION: Layers = {**_QUERY_KEY_VALUE, "self_attn.o_proj": ("hidden", "query")}
_PACKED_ATTENTION: Layers = {"self_attn.o_proj": ("hidden", "query"), "self_attn.qkv_proj": ("packed", "hidden")}
_UNGATED: Layers = {"mlp.up_proj": ("inner", "hidden"), "mlp.down_proj": ("hidden", "inner")}
_GATED: Layers = {"mlp.gate_proj": ("inner", "hidden"), **_UNGATED}
_PACKED: Layers = {"mlp.gate_up_proj": ("two_inner", "hidden"), "mlp.down_proj": ("hidden", "inner")}
_EXPERTS: Layers = {"mlp.experts.gate_up_proj": ("two_inner", "hidden"), "mlp.experts.down_proj": ("hidden", "inner")}
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_OWN_NORMS = ("attention_layernorm", "feedforward_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_KEY_VALUE, _HEADS = ("num_key_value_heads",), ("num_key_value_heads", "head_dim")
_ROUTED = ("num_key_value_heads", "num_experts_per_tok")


@dataclass(frozen=True)
class _Family:
    """What the blocks of a family hold, and the defaults of transformers' class."""

    attention: Layers = field(default_factory=_ATTENTION.copy)
    mlp: Layers = field(default_factory=_GATED.copy)
    norms: tuple[str, ...] = _TWO_NORMS
    head_norms: bool = False
    biases: Literal["none", "configured", "query, key and value", "all"] = "none"
    layer_norm: bool = False
    final_norm: str = "norm"
    width: str = "intermediate_size"  # the key of the feed-forward width
    in_activation: int = 0  # trained numbers of one block's activation function
    tied: bool = False  # whether embeddings and head are one weight by default
    capped: bool = False  # whether attention's scores and the logits are soft-capped by default
    activation: str = ""  # the default activation, where transformers writes it out in several operations
    needs: tuple[str, ...] = ()  # further keys whose defaults only transformers' class knows


_FAMILIES = {
    "llama": _Family(biases="configured"),
    "mistral": _Family(needs=_KEY_VALUE),
    "mixtral": _Family(mlp=_EXPERTS, needs=_ROUTED),
    "qwen2": _Family(biases="query, key and value", needs=_KEY_VALUE),
    "qwen3": _Family(head_norms=True, biases="configured", needs=_HEADS),
    "qwen3_moe": _Family(
        _ATTENTION, _EXPERTS, _TWO_NORMS, True, "configured", width="moe_intermediate_size", needs=_ROUTED
    ),
    "smollm3": _Family(biases="configured", tied=True, needs=_KEY_VALUE),
    "phi3": _Family(_PACKED_ATTENTION, _PACKED),
    "phi": _Family(
        {**_QUERY_KEY_VALUE, "self_attn.dense": ("hidden", "query")},
        {"mlp.fc1": ("inner", "hidden"), "mlp.fc2": ("hidden", "inner")},
        norms=("input_layernorm",),
        biases="all",
        layer_norm=True,
        final_norm="final_layernorm",
        activation="gelu_new",
    ),
    "gemma": _Family(biases="configured", tied=True, needs=_HEADS),
    "gemma2": _Family(norms=_FOUR_NORMS, biases="configured", tied=True, capped=True, needs=_HEADS),
    "gemma3_text": _Family(norms=_FOUR_NORMS, head_norms=True, biases="configured", tied=True, needs=_HEADS),
    "apertus": _Family(
        mlp=_UNGATED, norms=_OWN_NORMS, head_norms=True, biases="configured", in_activation=2, activation="xielu"
    ),
}


def is_known_family(config: dict[str, Any]) -> bool:
    """Whether a config is of a family that is counted here, so that its keys are known to mean what they say."""
    return str(config.get("model_type")) in _FAMILIES


def spec_from_config(config: dict[str, Any]) -> ModelSpec | None:
    """The spec of the model of a config.json; None where its family is not known here, or a size is missing.
    UserError where a value of a family that is known here is damaged."""
    family = _FAMILIES.get(str(config.get("model_type")))
    uncounted = config.get("qk_layernorm") or config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    if family is None or uncounted or config.get("attn_logit_softcapping") == "learned":
        return None
    sizes = _sizes_of(config, family)
    if sizes is None:
        return None
    tied = read_typed(config, "tie_word_embeddings", bool)
    tied = family.tied if tied is None else tied
    weights, modules = _weights_and_modules(config, family, sizes, tied)
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    named = ("hidden", "vocabulary", "layers", "heads", "key_value", "experts_used")
    return ModelSpec(
        model_type=config["model_type"],
        **{name: sizes[name] for name in named},
        weights=tuple(weights),
        modules=modules,
        embeddings="model.embed_tokens",
        norms=len(family.norms),
        head_norms=family.head_norms,
        layer_norm=family.layer_norm,
        activation=ACTIVATIONS.get(str(activation), 1),
        soft_capped=bool(config.get("attn_logit_softcapping", family.capped)),
        logits_capped=bool(config.get("final_logit_softcapping", family.capped)),
        shared={"lm_head": sizes["vocabulary"] * sizes["hidden"]} if tied else {},
    )


def _sizes_of(config: dict[str, Any], family: _Family) -> dict[str, Any] | None:
    """The sizes of a family's config by name; None where one is missing that only transformers' class knows."""
    keys = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    keys |= {"vocabulary": "vocab_size", "inner": family.width}
    sizes: dict[str, Any] = {name: read_typed(config, key, int) for name, key in keys.items()}
    experts_used = read_typed(config, "num_experts_per_tok", int) or 1
    experts = read_typed(config, "num_local_experts", int) or read_typed(config, "num_experts", int)
    is_missing = not all(sizes.values()) or any(key not in config for key in family.needs)
    if is_missing or (family.mlp is _EXPERTS and not experts):
        return None
    hidden, heads = sizes["hidden"], sizes["heads"]
    width, groups = read_typed(config, "head_dim", int), read_typed(config, "num_key_value_heads", int) or heads
    pairs = [] if width else [("hidden_size", hidden, "num_attention_heads", heads)]
    for key, value, other, parts in [*pairs, ("num_attention_heads", heads, "num_key_value_heads", groups)]:
        if value % parts:
            reason = f"{key} is {value}, which is not a multiple of {other}, {parts}"
            raise UserError(f"model.base: config.json: {reason}. Fetch the model again.")
    width = width or hidden // heads
    sizes |= {"experts": experts or 1, "experts_used": experts_used, "head_width": width, "query": heads * width}
    sizes |= {"key_value": groups * width, "packed": (heads + 2 * groups) * width, "two_inner": 2 * sizes["inner"]}
    return sizes


def _weights_and_modules(
    config: dict[str, Any], family: _Family, sizes: dict[str, Any], tied: bool
) -> tuple[list[WeightSpec], dict[str, int]]:
    hidden, vocabulary = sizes["hidden"], sizes["vocabulary"]
    configured = {half: read_typed(config, f"{half}_bias", bool) for half in ("attention", "mlp")}
    norm = hidden * (2 if family.layer_norm else 1)
    others = dict.fromkeys(family.norms, norm)
    if family.head_norms:
        others |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), sizes["head_width"])
    if family.mlp is _EXPERTS:
        others["mlp.gate"] = sizes["experts"] * hidden
    if family.in_activation:
        others["mlp.act_fn"] = family.in_activation
    weights, modules = [], {"model.embed_tokens": vocabulary * hidden}
    for prefix in (f"model.layers.{number}." for number in range(sizes["layers"])):
        for path, (rows, columns) in (family.attention | family.mlp).items():
            half, fused = "attention" if path in family.attention else "mlp", ".experts." in path
            count = sizes["experts"] if fused else 1
            weight = WeightSpec(prefix + path, half, fused, experts=count, outer=sizes[rows], inner=sizes[columns])
            weights.append(weight)
            owner = weight.path.rpartition(".")[0] if fused else weight.path
            has_bias = {"configured": configured[half], "query, key and value": path in _QUERY_KEY_VALUE, "all": True}
            bias = weight.outer if has_bias.get(family.biases) and not fused else 0
            modules[owner] = modules.get(owner, 0) + weight.size + bias
        modules |= {prefix + name: count for name, count in others.items()}
    modules[f"model.{family.final_norm}"] = norm
    modules["lm_head"] = vocabulary * hidden + (vocabulary if family.biases == "all" else 0)
    reason = TIED_HEAD if tied else UNTIED_HEAD
    head = WeightSpec(
        "lm_head", "", is_head=True, skip_reason=OUTSIDE, unadaptable=reason, outer=vocabulary, inner=hidden
    )
    return [*weights, head], modules
