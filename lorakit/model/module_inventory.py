"""What a model is made of: every weight that an adapter can be put on, and which half of a block it belongs to.

transformers' model families name the same thing differently. What is known of their names stands here.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lorakit.model.shared_prefix import body_of
from lorakit.model.spec import WeightSpec

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
    renamed = cache(lambda name: _is_renamed(model, name))
    decoder, head, modules = body_of(model), model.get_output_embeddings(), dict(model.named_modules())
    inside = next((f"{path}." for path, module in modules.items() if path and module is decoder), "")
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    is_one = "it is one weight with the embeddings" if is_tied else "it is the output head"
    beside = f"{is_one}, which adapter.train_modules can train"
    found = []
    for path, module in modules.items():
        if isinstance(module, torch.nn.Linear | Conv1D):
            container, _, name = path.rpartition(".")
            found.append(
                WeightSpec(
                    path,
                    _half(path),
                    is_head=module is head,
                    skip_reason=_aside(path, inside),
                    unadaptable=beside if module is head else _dead(modules[container], name, module),
                    peft_renames=renamed(name),
                    quantized=not module.weight.is_floating_point(),
                    outer=module.nf if isinstance(module, Conv1D) else module.out_features,
                    inner=module.nx if isinstance(module, Conv1D) else module.in_features,
                )
            )
        found += [
            WeightSpec(
                name,
                _half(name),
                fused=True,
                skip_reason=_aside(name, inside),
                experts=shape[0],
                outer=shape[1],
                inner=shape[2],
            )
            for name, shape in _fused(path, module)
        ]
    return found


def _fused(path: str, module: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The stacked matrices of a module of experts, such as MixtralExperts or JetMoeParallelExperts."""
    if type(module).__name__.endswith("Experts"):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                yield f"{path}.{name}", tuple(parameter.shape)


def _half(path: str) -> str:
    *parts, name = path.split(".")
    for part in reversed(parts):
        if _ATTENTION_PART.fullmatch(part):
            return "attention"
        if _MLP_PART.fullmatch(part):
            return "mlp"
    if _ATTENTION_LAYER.fullmatch(name):
        return "attention"
    return "mlp" if _MLP_LAYER.fullmatch(name) else ""


def _aside(path: str, inside: str) -> str:
    parts = path.split(".")
    if not path.startswith(inside) or any(_TOWER_PART.fullmatch(part) for part in parts):
        return "not part of the language model"
    if any(_ROUTER_PART.fullmatch(part) for part in parts):
        return "weighs the experts (a router)"
    return "chooses positions, and gets no gradient" if "indexer" in parts else ""


def _dead(container: Any, name: str, module: Any) -> str:
    if any(kind.fullmatch(type(container).__name__) and name in names for kind, names in _READ_DIRECTLY):
        return "the model reads its weight without calling the layer"
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.") and "forward" in vars(kind)
    if kind is NonDynamicallyQuantizableLinear or (own and kind.__name__ != "FalconLinear"):
        return "it computes something else than a linear layer"
    return ""


def _is_renamed(model: Any, name: str) -> bool:
    """Whether PEFT rewrites a layer of this name into the fused experts that families of transformers 5 have.

    peft.utils.transformers_weight_conversion does so by the last part of a path, for the dense layers and the shared
    experts of these families as well, in every LoraConfig that is attached or loaded.
    """
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # the name is one of two that it would fuse, and the other one is not there
        return True
    return name not in config.target_modules
