"""What a model is made of, read off its modules: every weight that an adapter can be put on, and which half of a block
it belongs to. From its config alone on torch's meta device: no weight is read, and none is allocated.

transformers' model families name the same thing differently. What is known of their names stands here.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorakit.errors import BaseModelError, UserError
from lorakit.model.loss import body_of
from lorakit.model.spec import ACTIVATIONS, OUTSIDE, TIED_HEAD, UNTIED_HEAD, WRITTEN_OUT, ModelSpec, WeightSpec
from lorakit.model.tokenizer import DAMAGED
from lorakit.recipe.problem import one_line

_DAMAGED = (*DAMAGED, RuntimeError, RecursionError)
_LONGEST_REASON = 240
# Layers of state space models whose scan transformers writes out token by token.
_SCANNING = re.compile(r"(Falcon)?MambaMixer|JambaMambaMixer")

# Parts of a path that hold one half of a block, the innermost deciding; and layers that stand in no such part.
_ATTENTION_PART = re.compile(r"(\w+_)?(attn|att|attention)")
_MLP_PART = re.compile(r"(\w+_)?(mlp|mlps|ffn|ff|feed_?forward)(_\w+)?|block_sparse_moe|moe")
_ATTENTION_LAYER = re.compile(r"(q|k|v|o|qkv)_proj|(q|k|v|out)_lin")
_MLP_LAYER = re.compile(r"(gate|up|down|gate_up)_proj|fc1|fc2|lin1|lin2")

_ROUTER_PART = re.compile(r"(\w+_)?router(_\w+)?|gate|shared_expert_gate")
_TOWER_PART = re.compile(r"(vision|visual|image|img|audio|speech)(_\w+)?")

# Layers whose weight transformers' own code reads, in one path of its code at least, without calling the layer: the
# fused kernels of state space models on a GPU, and Gemma 3n's clipped coefficients. An adapter there does nothing.
_READ_DIRECTLY = (
    (re.compile(r"(Falcon)?MambaMixer"), ("x_proj", "dt_proj", "out_proj")),
    (re.compile(r"JambaMambaMixer"), ("dt_proj",)),
    (re.compile(r"(Mamba2|Bamba|FalconH1|NemotronHMamba2|Zamba2Mamba)Mixer|GraniteMoeHybridMambaLayer"), ("out_proj",)),
    (re.compile(r"Gemma3nTextAltUp"), ("correction_coefs",)),
)


def meta_model(config: Path | dict[str, Any]) -> Any:
    """The model of a config without weights, on the meta device; UserError where it is no causal language model's."""
    read = read_hf_config(config)
    with torch.device("meta"):
        return empty_model(read)


def empty_model(config: Any, **options: Any) -> Any:
    """The model of transformers' configuration, as its class makes it; UserError where there is none for it."""
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except (*_DAMAGED, ImportError) as error:  # some families need a library more
        raise _no_model(error) from error


def read_hf_config(config: Path | dict[str, Any]) -> Any:
    """transformers' configuration of a model's folder, or of what is in its config.json. UserError where it is not
    one, or of a family that this transformers does not know."""
    try:
        if isinstance(config, dict):
            return AutoConfig.for_model(**config)
        return AutoConfig.from_pretrained(config, trust_remote_code=False)
    except _DAMAGED as error:
        raise _no_model(error) from error


def _no_model(error: BaseException) -> UserError:
    """With the first sentence of transformers' error, which goes from a bare key to a list of all its families."""
    sentence = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
    reason = f"transformers {transformers.__version__} can make no causal language model of this config"
    remedy = "Fetch the model again, name one of a family that it knows, or install a newer transformers."
    return BaseModelError(f"{reason}: {one_line(sentence, _LONGEST_REASON)}. {remedy}")


def spec_from_meta(config: Path | dict[str, Any]) -> ModelSpec:
    """The spec of any causal language model that transformers can make; UserError where the config is of none."""
    model = meta_model(config)
    text = model.config.get_text_config()
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    numbers = {path: sum(p.numel() for p in module.parameters(recurse=False)) for path, module in modules.items()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    heads = _first(text, "num_attention_heads", "n_head") or 1
    hidden = _first(text, "hidden_size", "n_embd", "d_model") or inputs.weight.shape[-1]
    head_width = _first(text, "head_dim") or hidden // heads
    norms = _norms_of_last_block(body_of(model))
    activations = (getattr(text, name, None) for name in ("hidden_activation", "hidden_act", "activation_function"))
    activation = str(next(filter(None, activations), ""))
    experts_used = _first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1
    if any(type(module).__name__ == "Llama4TextExperts" for module in modules.values()):
        experts_used = text.num_local_experts  # every token goes through all of them, most with a weight of zero
    scanning = [module for module in modules.values() if _SCANNING.fullmatch(type(module).__name__)]
    return ModelSpec(
        model_type=text.model_type,
        hidden=hidden,
        vocabulary=inputs.weight.shape[0],
        layers=_first(text, "num_hidden_layers", "n_layer") or 1,
        heads=heads,
        key_value=(_first(text, "num_key_value_heads") or heads) * head_width,
        weights=tuple(list_weights(model)),
        modules={path: count for path, count in numbers.items() if count},
        embeddings=paths[id(inputs)],
        norms=sum(norm.weight.shape[-1] == hidden for norm in norms),
        head_norms=any(norm.weight.shape[-1] != hidden for norm in norms),
        layer_norm=any(type(norm).__name__ == "LayerNorm" for norm in norms),
        experts_used=experts_used,
        soft_capped=bool(getattr(text, "attn_logit_softcapping", None)),
        logits_capped=any(getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")),
        activation=WRITTEN_OUT.get(text.model_type) or ACTIVATIONS.get(activation, 1),
        scan_states=max((module.intermediate_size * module.ssm_state_size for module in scanning), default=0),
        built=True,
        shared={paths[id(outputs)]: outputs.weight.numel()} if tied else {},
    )


def _first(config: Any, *names: str) -> int | None:
    """The first of these that is a whole number; where layers differ, that of most of them."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
            value = vars(config).get(name)
        if isinstance(value, int):
            return value
    return None


def _norms_of_last_block(body: Any) -> list[Any]:
    placed = [(re.search(r"(?:^|\.)(\d+)\.", path), module) for path, module in body.named_modules()]
    last = max((int(match[1]) for match, _ in placed if match), default=0)
    inside = [module for match, module in placed if match and int(match[1]) == last]
    return [norm for norm in inside if "Norm" in type(norm).__name__ and getattr(norm, "weight", None) is not None]


def list_weights(model: Any) -> list[WeightSpec]:
    """Every weight of a causal language model that PEFT could be told to adapt, in the model's order."""
    peft_renames = cache(lambda name: _is_renamed(model, name))
    decoder, head, modules = body_of(model), model.get_output_embeddings(), dict(model.named_modules())
    inside = next((f"{path}." for path, module in modules.items() if path and module is decoder), "")
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    head_reason = TIED_HEAD if is_tied else UNTIED_HEAD
    weights = []
    for path, module in modules.items():
        container, _, name = path.rpartition(".")
        if isinstance(module, torch.nn.Linear | Conv1D):
            sides = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
            weight = WeightSpec(
                **_placed(path, inside),
                is_head=module is head,
                unadaptable=head_reason if module is head else _unadaptable(modules[container], name, module),
                peft_renames=peft_renames(name),
                quantized=not module.weight.is_floating_point(),
                outer=sides[0],
                inner=sides[1],
            )
            weights.append(weight)
        elif type(module).__name__.endswith("Experts"):  # stacked matrices, as of MixtralExperts
            for full_name, parameter in module.named_parameters(path, recurse=False):
                if parameter.ndim == 3:
                    experts, rows, columns = parameter.shape
                    place = _placed(full_name, inside)
                    weights.append(WeightSpec(**place, fused=True, experts=experts, outer=rows, inner=columns))
    return weights


def _placed(path: str, inside: str) -> dict[str, Any]:
    """What follows from a weight's path. `inside`: what the paths of the language model begin with."""
    parts, reason = path.split("."), ""
    if not path.startswith(inside) or any(_TOWER_PART.fullmatch(part) for part in parts):
        reason = OUTSIDE
    elif any(_ROUTER_PART.fullmatch(part) for part in parts):
        reason = "weighs the experts (a router)"
    elif "indexer" in parts:
        reason = "chooses positions, and gets no gradient"
    sublayer = (
        "attention" if _ATTENTION_LAYER.fullmatch(parts[-1]) else "mlp" if _MLP_LAYER.fullmatch(parts[-1]) else ""
    )
    for part in parts[:-1]:  # the innermost decides
        sublayer = "attention" if _ATTENTION_PART.fullmatch(part) else "mlp" if _MLP_PART.fullmatch(part) else sublayer
    return {"path": path, "sublayer": sublayer, "skip_reason": reason}


def _unadaptable(container: Any, name: str, module: Any) -> str:
    if any(kind.fullmatch(type(container).__name__) and name in names for kind, names in _READ_DIRECTLY):
        return "the model reads its weight without calling the layer"
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.") and "forward" in vars(kind)
    if kind is NonDynamicallyQuantizableLinear or (own and kind.__name__ != "FalconLinear"):
        return "it computes something else than a linear layer"
    return ""


def _is_renamed(model: Any, name: str) -> bool:
    """Whether PEFT rewrites a layer of this name into the fused experts that families of transformers 5 have: it goes
    by the last part of a path (peft.utils.transformers_weight_conversion), in dense layers as well."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # the name is one of two that it would fuse, and the other one is not there
        return True
    return name not in config.target_modules
