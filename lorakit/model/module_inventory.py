"""What a model is made of: every weight that an adapter can be put on, and which half of a block it belongs to.

transformers' model families name the same thing differently. What is known of their names stands here.
"""

import re
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lorakit.model.shared_prefix import body_of
from lorakit.model.spec import OUTSIDE, TIED_HEAD, UNTIED_HEAD, WeightSpec

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
            is_conv = isinstance(module, Conv1D)
            weight = WeightSpec(
                **_placed(path, inside),
                is_head=module is head,
                unadaptable=head_reason if module is head else _unadaptable(modules[container], name, module),
                peft_renames=peft_renames(name),
                quantized=not module.weight.is_floating_point(),
                outer=module.nf if is_conv else module.out_features,
                inner=module.nx if is_conv else module.in_features,
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
    return {"path": path, "sublayer": _sublayer(parts), "skip_reason": reason}


def _sublayer(parts: list[str]) -> str:
    for part in reversed(parts[:-1]):
        if _ATTENTION_PART.fullmatch(part):
            return "attention"
        if _MLP_PART.fullmatch(part):
            return "mlp"
    if _ATTENTION_LAYER.fullmatch(parts[-1]):
        return "attention"
    return "mlp" if _MLP_LAYER.fullmatch(parts[-1]) else ""


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
