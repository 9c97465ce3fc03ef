"""Target selection: which modules of a model get an adapter."""

import re
from collections import Counter
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from lorakit.errors import UserError
from lorakit.recipe.schema import Adapter

# The names that transformers' model families give to the linear layers of the two halves of a block.
_ATTENTION = re.compile(
    r"(^|\.)(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|query_key_value|query|key|value|c_attn|Wqkv|q_a_proj|q_b_proj"
    r"|kv_a_proj_with_mqa|kv_b_proj|in_proj_qkv)$|(^|\.)(attn|self_attention|attention|self_attn)\.(c_proj|dense|wo|proj)$"
)
_MLP = re.compile(
    r"(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h|c_fc|w1|w2|w3)$"
    r"|(^|\.)mlp\.c_proj$"
)


def linear_modules(model: Any) -> list[str]:
    """The paths of all linear layers but the output head, in the model's order."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def select_targets(model: Any, settings: Adapter) -> list[str]:
    """The paths of the modules that `adapter.targets` and `adapter.exclude` choose.

    Raises:
        UserError: a word chooses nothing; the message lists what the model has.
    """
    modules = linear_modules(model)
    chosen = _chosen(modules, settings.targets)
    for pattern in settings.exclude:
        hit = {name for name in chosen if _matches(name, pattern)}
        if not hit:
            raise _nothing("adapter.exclude", pattern, modules)
        chosen = [name for name in chosen if name not in hit]
    if not chosen:
        raise UserError("adapter.exclude takes away every module that adapter.targets chose. Exclude less.")
    return chosen


def _chosen(modules: list[str], targets: str | list[str]) -> list[str]:
    if isinstance(targets, list):
        for word in targets:
            if not any(_named(name, word) for name in modules):
                raise _nothing("adapter.targets", word, modules)
        return [name for name in modules if any(_named(name, word) for word in targets)]
    groups = {"all-linear": re.compile(""), "attention": _ATTENTION, "mlp": _MLP}
    if targets in groups:
        chosen = [name for name in modules if groups[targets].search(name)]
    else:
        chosen = [name for name in modules if re.fullmatch(targets, name)]
    if not chosen:
        raise _nothing("adapter.targets", targets, modules)
    return chosen


def _named(path: str, word: str) -> bool:
    return path == word or path.endswith("." + word)


def _matches(path: str, pattern: str) -> bool:
    return _named(path, pattern) or re.fullmatch(pattern, path) is not None


def _nothing(key: str, pattern: str, modules: list[str]) -> UserError:
    counts = Counter(name.rsplit(".", 1)[-1] for name in modules)
    names = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return UserError(f"{key}: {pattern!r} matches no linear layer of this model, which has {names}.")
