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
_MOST_SAID = 240
_SCANNING = re.compile(r"(Falcon)?MambaMixer|JambaMambaMixer")


def meta_model(config: Path | dict[str, Any]) -> Any:
    """The model of a config without weights, on torch's meta device.

    Raises:
        UserError: the config is of no causal language model.
    """
    read = read_hf_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read, trust_remote_code=False)
    except (*_DAMAGED, ImportError) as error:  # some families need a library more
        raise _no_model(error) from error


def read_hf_config(config: Path | dict[str, Any]) -> Any:
    """transformers' configuration of a model's folder, or of what is in its config.json.

    Raises:
        UserError: it is none, or of a family that this transformers does not know.
    """
    try:
        if isinstance(config, dict):
            return AutoConfig.for_model(**config)
        return AutoConfig.from_pretrained(config, trust_remote_code=False)
    except (*_DAMAGED, RecursionError) as error:
        raise _no_model(error) from error


def _no_model(error: BaseException) -> UserError:
    """The first sentence of transformers' error, which goes from a bare key to a list of all its families."""
    told = "".join(sign if sign.isprintable() else " " for sign in str(error))
    words = " ".join(told.split()).partition(". ")[0] or type(error).__name__
    said = words.rstrip(".") if len(words) <= _MOST_SAID else f"{words[:_MOST_SAID].rstrip()} ..."
    ours = f"transformers {transformers.__version__}"
    return UserError(
        f"model.base: {ours} can make no causal language model of this config: {said}. "
        "Fetch the model again, name one of a family that it knows, or install a newer transformers."
    )


def spec_from_meta(config: Path | dict[str, Any]) -> ModelSpec:
    """The spec of any causal language model that transformers can make.

    Raises:
        UserError: the config is of no causal language model.
    """
    model = meta_model(config)
    text = model.config.get_text_config()
    modules = dict(model.named_modules())
    own = {path: sum(p.numel() for p in module.parameters(recurse=False)) for path, module in modules.items()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    heads = _first(text, "num_attention_heads", "n_head") or 1
    hidden = _first(text, "hidden_size", "n_embd", "d_model") or inputs.weight.shape[-1]
    width = _first(text, "head_dim") or hidden // heads
    paths = {id(module): path for path, module in modules.items()}
    norms = _norms(dict(body_of(model).named_modules()), hidden)
    return ModelSpec(
        model_type=text.model_type,
        hidden=hidden,
        vocabulary=inputs.weight.shape[0],
        tied=tied,
        layers=_first(text, "num_hidden_layers", "n_layer") or 1,
        heads=heads,
        key_value=(_first(text, "num_key_value_heads") or heads) * width,
        weights=tuple(list_weights(model)),
        modules={path: count for path, count in own.items() if count},
        embeddings=paths[id(inputs)],
        norms=sum(wide for wide, _ in norms),
        head_norms=any(not wide for wide, _ in norms),
        layer_norm=any(kind == "LayerNorm" for _, kind in norms),
        experts_used=_experts_used(text, modules),
        soft_capped=bool(getattr(text, "attn_logit_softcapping", None)),
        logits_capped=any(getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")),
        activation=WRITTEN_OUT.get(text.model_type) or ACTIVATIONS.get(_activation(text), 1),
        scan_states=max((_scanned(module) for module in modules.values()), default=0),
        built=True,
        shared={paths[id(outputs)]: outputs.weight.numel()} if tied else {},
    )


def _experts_used(config: Any, modules: dict[str, Any]) -> int:
    if any(type(module).__name__ == "Llama4TextExperts" for module in modules.values()):
        return int(config.num_local_experts)  # every token goes through all of them, most with a weight of zero
    return _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1


def _scanned(module: Any) -> int:
    """The numbers of one token's states in the scan of a Mamba layer, which transformers writes out step by step."""
    if not _SCANNING.fullmatch(type(module).__name__):
        return 0
    return int(module.intermediate_size) * int(module.ssm_state_size)


def _activation(config: Any) -> str:
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(value) for name in names if (value := getattr(config, name, None))), "")


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := _value(config, name), int)), None)


def _value(config: Any, name: str) -> Any:
    """What a config says of all layers; where they differ, of most of them."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return vars(config).get(name)


def _norms(modules: dict[str, Any], hidden: int) -> list[tuple[bool, str]]:
    """The normalizations of the last block: whether each goes over the hidden width, and its kind."""
    placed = [(path, re.search(r"(?:^|\.)(\d+)\.", path)) for path in modules]
    last = max((int(match[1]) for _, match in placed if match), default=0)
    inside = [modules[path] for path, match in placed if match and int(match[1]) == last]
    found = [
        module for module in inside if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
    ]
    return [(module.weight.shape[-1] == hidden, type(module).__name__) for module in found]
