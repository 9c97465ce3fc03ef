"""What a model is made of, from its config alone, on torch's meta device: no weight is read, and none is allocated."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.model.module_inventory import list_weights
from lorakit.model.shared_prefix import body_of
from lorakit.model.spec import ACTIVATIONS, WRITTEN_OUT, ModelSpec

_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    StrictDataclassError,
)
_LONGEST_REASON = 240
# Layers of state space models whose scan transformers writes out token by token.
_SCANNING = re.compile(r"(Falcon)?MambaMixer|JambaMambaMixer")


def meta_model(config: Path | dict[str, Any]) -> Any:
    """The model of a config without weights, on torch's meta device. UserError where the config is of no causal
    language model."""
    read = read_hf_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read, trust_remote_code=False)
    except (*_DAMAGED, ImportError) as error:  # some families need a library more
        raise _no_model(error) from error


def read_hf_config(config: Path | dict[str, Any]) -> Any:
    """transformers' configuration of a model's folder, or of what is in its config.json. UserError where it is not
    one, or of a family that this transformers does not know."""
    try:
        if isinstance(config, dict):
            return AutoConfig.for_model(**config)
        return AutoConfig.from_pretrained(config, trust_remote_code=False)
    except (*_DAMAGED, RecursionError) as error:
        raise _no_model(error) from error


def _no_model(error: BaseException) -> UserError:
    """With the first sentence of transformers' error, which goes from a bare key to a list of all its families."""
    printable = "".join(sign if sign.isprintable() else " " for sign in str(error))
    sentence = " ".join(printable.split()).partition(". ")[0].rstrip(".") or type(error).__name__
    if len(sentence) > _LONGEST_REASON:
        sentence = f"{sentence[:_LONGEST_REASON].rstrip()} ..."
    return UserError(
        f"model.base: transformers {transformers.__version__} can make no causal language model of this config: "
        f"{sentence}. Fetch the model again, name one of a family that it knows, or install a newer transformers."
    )


def spec_from_meta(config: Path | dict[str, Any]) -> ModelSpec:
    """The spec of any causal language model that transformers can make. UserError where the config is of no causal
    language model."""
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
        **_traits(text, list(modules.values())),
        built=True,
        shared={paths[id(outputs)]: outputs.weight.numel()} if tied else {},
    )


def _traits(text: Any, modules: list[Any]) -> dict[str, Any]:
    """What the family's own code does with the sizes."""
    activations = (getattr(text, name, None) for name in ("hidden_activation", "hidden_act", "activation_function"))
    activation = str(next(filter(None, activations), ""))
    experts_used = _first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1
    if any(type(module).__name__ == "Llama4TextExperts" for module in modules):
        experts_used = text.num_local_experts  # every token goes through all of them, most with a weight of zero
    scanning = [module for module in modules if _SCANNING.fullmatch(type(module).__name__)]
    return {
        "experts_used": experts_used,
        "soft_capped": bool(getattr(text, "attn_logit_softcapping", None)),
        "logits_capped": any(getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")),
        "activation": WRITTEN_OUT.get(text.model_type) or ACTIVATIONS.get(activation, 1),
        "scan_states": max((module.intermediate_size * module.ssm_state_size for module in scanning), default=0),
    }


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
    return [
        module for module in inside if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
    ]
