"""What a model of any family is made of: built without weights, and its own code followed for what it keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.model.activation_trace import trace_activations
from lorakit.model.spec import ModelSpec
from lorakit.model.spec_from_meta import read_hf_config, spec_from_meta
from lorakit.plan.activations import TrainingStep, block_activations
from lorakit.plan.trainable_params import count_trainable
from lorakit.recipe.schema import Adapter


def spec_with_trace(config: Path | dict[str, Any], settings: Adapter) -> ModelSpec:
    """The spec of a model that is not counted from its config, with what the derivation of activations misses: it hangs
    little on the adapter, and is looked at with what comes nearest to the recipe's. `config`: a model's folder, or what
    is in its config.json; a `UserError` where it is of no causal language model."""
    spec = spec_from_meta(config)
    # Plain LoRA, DoRA or full fine-tuning of the same modules, in all layers.
    same = {name: getattr(settings, name) for name in ("rank", "dropout", "targets", "exclude")}
    near = Adapter.model_validate({"kind": settings.kind if settings.kind in ("dora", "none") else "lora", **same})
    half, whole = (_missed(read_hf_config(config), spec, near, is_half) for is_half in (True, False))
    if not whole:  # fused experts have code of their own for float32, which cannot always be followed
        whole = {(number, 4): (2 * token, 0.0) for (number, _), (token, _) in half.items()}
    return replace(spec, extra_bytes=half | whole)


def _missed(config: Any, spec: ModelSpec, settings: Adapter, half: bool) -> dict[tuple[int, int], tuple[float, float]]:
    trace = trace_activations(config, spec, settings, half)
    if trace is None:
        return {}
    (attention, bytes_by_block), adapted, missed = trace, count_trainable(spec, settings), {}
    dtype, dropout = "bfloat16" if half else "float32", settings.dropout
    way = TrainingStep(1, 1, 1, dtype, attention=attention, dropout=dropout, on_gpu=False)
    for number, (token, pair) in bytes_by_block.items():
        derived = block_activations(spec, spec.blocks[number], adapted, way)
        missed[number, way.width] = token - derived.per_token, pair - derived.per_pair
    return missed
