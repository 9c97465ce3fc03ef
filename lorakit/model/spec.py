"""What a model is made of, in plain numbers: enough to count parameters, memory and operations; read off a config.json
for the families whose layers are known exactly. No torch here, no weights.

The layers are those of transformers' modeling files; a test compares every family with the model that transformers
makes of the same config.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lorakit.errors import BaseModelError, UserError
from lorakit.model.config_values import read_typed

# The layers that close one half of a block: attention's output, and the way back from the feed-forward width.
_CLOSING = re.compile(r"(o|out|c|down)_proj|dense(_4h_to_h)?|wo|w2|fc2|fc_out|out_lin|lin2|output_linear")

# How many tensors of the feed-forward width an activation keeps where transformers writes it out in several operations
# (its activations.py), and where a family's own code does so, whatever the config names (counted with hooks).
ACTIVATIONS = {"gelu_new": 4, "gelu_accurate": 4, "gelu_fast": 5, "quick_gelu": 2, "xielu": 3}
WRITTEN_OUT = {"gpt_oss": 9}

TIED_HEAD = "it is one weight with the embeddings, which adapter.train_modules can train"
UNTIED_HEAD = "it is the output head, which adapter.train_modules can train"
OUTSIDE = "not part of the language model"


@dataclass(frozen=True)
class WeightSpec:
    """A weight that an adapter could be put on: of a linear layer, or a fused one with a matrix for each expert."""

    path: str  # the path of the layer, or of the fused parameter
    sublayer: str  # `attention`, `mlp`, or nothing where it is neither, as in a state space model
    fused: bool = False  # whether it is a parameter (experts, rows, columns), which PEFT adapts by `target_parameters`
    is_head: bool = False
    skip_reason: str = ""  # why the words `all-linear`, `attention` and `mlp` do not mean it
    unadaptable: str = ""  # why an adapter on it would do nothing, or something wrong
    peft_renames: bool = False
    """Whether PEFT takes the layer's name for that of fused experts, as in checkpoints of transformers 4."""
    quantized: bool = False
    outer: int = 0
    """Rows: the features that come out; of a fused weight the rows of one expert's matrix, as it lies in memory."""
    inner: int = 0  # columns: the features that go in
    experts: int = 1  # how many matrices a fused weight holds

    @property
    def layer(self) -> int | None:
        """The number of its block: the first number in its path."""
        return next((int(part) for part in self.path.split(".") if part.isdecimal()), None)

    @property
    def parameter(self) -> str | None:
        """The full path of the parameter that PEFT has to be given, where it cannot be given a layer."""
        if self.fused:
            return self.path
        return f"{self.path}.weight" if self.peft_renames else None

    @property
    def size(self) -> int:
        """The numbers in it."""
        return self.experts * self.outer * self.inner


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of one causal language model."""

    model_type: str
    hidden: int
    vocabulary: int
    layers: int
    heads: int
    key_value: int  # the width of keys, and of values
    weights: tuple[WeightSpec, ...]  # every weight of a linear layer and of fused experts, the output head included
    modules: dict[str, int]  # every module that holds parameters itself -> how many
    embeddings: str  # the path of the input embeddings
    norms: int = 2  # normalizations over the hidden width in one block
    head_norms: bool = False  # whether queries and keys are normalized too
    layer_norm: bool = False  # LayerNorm instead of RMSNorm
    experts_used: int = 1  # the experts that one token goes through
    activation: int = 1  # how many tensors of the feed-forward width the activation keeps for its backward
    soft_capped: bool = False  # whether attention's scores go through a tanh, as Gemma 2's do
    logits_capped: bool = False  # whether the logits do
    scan_states: int = 0
    """Numbers of one token's states in a state space layer's scan: inner width x states; 0 where there is none."""
    built: bool = False  # whether it was read off a model on torch's meta device instead of counted from the config
    extra_bytes: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    """What a traced model keeps beyond what is derived: first block of each make, and bytes of a number -> bytes of a
    token, and on a processor of a pair of tokens."""
    untraced: str = ""  # why the code of a built model could not be followed
    shared: dict[str, int] = field(default_factory=dict)
    """Modules whose weights are those of another one, such as a tied output head, and are counted there."""

    @cached_property
    def parameters(self) -> int:
        """All numbers of the model; tied embeddings once."""
        return sum(size for path, size in self.modules.items() if path not in self.shared)

    @cached_property
    def blocks(self) -> dict[int, list[WeightSpec]]:
        """Layer number -> its weights, of the language model's own layers."""
        blocks = defaultdict(list)
        for weight in self.weights:
            if weight.layer is not None and weight.skip_reason != OUTSIDE:
                blocks[weight.layer].append(weight)
        return dict(blocks)

    @cached_property
    def block_numbers(self) -> dict[int, int]:
        """Layer number -> all numbers of the block, its norms and biases included."""
        numbers: dict[int, int] = defaultdict(int)
        for path, size in self.modules.items():
            layer = WeightSpec(path, "").layer
            if layer in self.blocks and path not in self.shared:
                numbers[layer] += size
        return dict(numbers)

    @cached_property
    def prototypes(self) -> dict[int, int]:
        """Layer number -> the first layer that is made alike: most models repeat one block."""
        prototypes: dict[int, int] = {}
        first: dict[tuple[object, ...], int] = {}
        for number, block in self.blocks.items():
            make = tuple(
                (w.path.partition(f".{number}.")[2], w.sublayer, w.skip_reason, w.fused, w.experts, w.outer, w.inner)
                for w in block
            )
            prototypes[number] = first.setdefault(make, number)
        return prototypes

    @cached_property
    def quantizable(self) -> list[WeightSpec]:
        """What bitsandbytes quantizes: linear layers, the head excepted; fused experts stay as they are."""
        return [weight for weight in self.weights if not weight.fused and not weight.is_head]

    @cached_property
    def active_numbers(self) -> int:
        """The numbers in the blocks that one token is multiplied with."""
        own = (weight for block in self.blocks.values() for weight in block)
        return sum(self.used(weight) * weight.outer * weight.inner for weight in own)

    def used(self, weight: WeightSpec) -> int:
        """How many matrices of a weight one token goes through."""
        return min(self.experts_used, weight.experts) if weight.fused else 1

    def whole(self, names: list[str]) -> dict[str, int]:
        """The modules that `adapter.train_modules` means -> their numbers; of tied embeddings one end."""
        named: dict[str, int] = {}
        for name in names:
            hit = {path: size for path, size in self.modules.items() if f".{name}." in f".{path}."}
            if not hit:
                own = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in self.modules))
                raise UserError(f"adapter.train_modules: {name!r} is not a module of this model, which has {own}.")
            named |= hit
        if any(path in named for path in self.shared):
            named = {path: size for path, size in named.items() if path not in self.shared}
            named[self.embeddings] = self.modules[self.embeddings]
        return named


def part(weight: WeightSpec) -> Literal["opens", "closes"]:
    """Whether a weight of a half of a block takes the hidden states in, or gives its result back to them."""
    return "closes" if _CLOSING.fullmatch(weight.path.rsplit(".", 1)[-1]) else "opens"


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
            raise BaseModelError(f"config.json: {reason}. Fetch the model again.")
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
