"""What autograd keeps of one pass through the blocks, in bytes: what each operation saves for its backward.

Derived from transformers' modeling files, PEFT's layers and torch's derivatives; docs/planning.md has the table, by
operation. Blocks below the first that has an adapter keep nothing. A family that is not counted from its config is
built without weights, and its own code followed for what it keeps.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.model.spec import ModelSpec, WeightSpec, part
from lorakit.plan.trainable_params import TrainableParams, count_trainable
from lorakit.recipe.schema import Adapter

# Tokens of a row at which blocks that differ are compared.
_A_ROW = 1024
# Tensors of its states that the scan of a Mamba layer keeps in each step (transformers' slow path).
_SCAN = 4


@dataclass(frozen=True)
class TrainingStep:
    """How tokens are computed, as far as memory depends on it, besides the model and what is trained of it."""

    rows: int  # rows, or packs, in one micro-batch
    length: int  # tokens of each, padding included
    trained: int  # positions of the micro-batch at which the loss is computed
    dtype: str = "bfloat16"
    quantization: str = "none"
    double_quant: bool = True
    attention: str = "sdpa"
    checkpointing: bool = False
    offloading: bool = False  # what is kept waits in main memory
    masked: bool = True  # whether attention takes a mask: of packs, but in variable-length attention
    dropout: float = 0.0
    optimizer: str = "adamw"
    accumulates: bool = False  # several micro-batches a step: gradients are there in the forward pass
    on_gpu: bool = True
    card: int = 0  # bytes of memory of the GPU, where it is known
    trained_width: int = 4  # bytes of a trained number and of its gradient, and of each of AdamW's states
    devices: int = 1  # that train together: the rows here are those of one of them
    sharding: str = "none"  # what they share out besides rows
    kernels: tuple[str, ...] = ()  # by name: they keep a norm's input as it is, and of a gate what goes in
    collectives: int = 0  # bytes that the library by which they talk takes on a device
    # What other software does: no autocast over an adapter in float32; every frozen linear layer keeps its input too,
    # as int8 ones do; each adapted layer copies its input to float32, as PEFT's own does outside of autocast; adapters
    # are written out in torch, as PEFT's own are, so that autograd keeps A x, and what dropout leaves of each input.
    plain_half: bool = False
    keeps_inputs: bool = False
    copies: bool = False
    written_out: bool = False

    @property
    def width(self) -> int:
        """Bytes of a number in the arithmetic."""
        return 4 if self.dtype == "float32" else 2

    @property
    def autocast(self) -> bool:
        return self.width < 4 and not self.plain_half


@dataclass(frozen=True)
class SavedActivations:
    """What stays of a pass, in bytes: for each token, for each pair of tokens of a row, and once."""

    per_token: float
    per_pair: float
    fixed: float = 0.0  # whatever the tokens
    freed_first: float = 0.0  # of `per_token`, gone when the backward of attention runs: feed-forward comes first
    scores: float = 0.0  # what that backward holds for each pair of tokens beside what was kept

    def of(self, rows: int, length: int) -> float:
        """Bytes for so many rows of so many tokens."""
        return rows * length * (self.per_token + self.per_pair * length) + self.fixed

    def attending(self, rows: int, length: int) -> float:
        """Bytes of one block while the backward of its attention runs."""
        return self.of(rows, length) + rows * length * (self.scores * length - self.freed_first)


def saved_activations(
    spec: ModelSpec, adapted: TrainableParams, way: TrainingStep
) -> tuple[SavedActivations, SavedActivations]:
    """What stays of all blocks, and of the largest of them."""
    by_shape: dict[tuple[int, tuple[int, ...]], SavedActivations] = {}
    blocks = []
    for number, weights in spec.blocks.items():
        if number < adapted.first_block:
            continue
        key = spec.prototypes[number], tuple(adapted.ranks.get(weight.path, 0) for weight in weights)
        if key not in by_shape:
            derived = block_activations(spec, weights, adapted, way)
            # What the trace of a built family kept besides (spec_with_trace): of pairs on a processor only, as a GPU
            # has other kernels of attention.
            token, pair = spec.extra_bytes.get((key[0], way.width), (0.0, 0.0))
            per_pair = derived.per_pair if way.on_gpu else max(0.0, derived.per_pair + pair)
            by_shape[key] = replace(derived, per_token=max(0.0, derived.per_token + token), per_pair=per_pair)
        blocks.append(by_shape[key])
    largest = max(blocks, key=lambda block: block.of(1, _A_ROW), default=SavedActivations(0, 0))
    # The norm after the last block keeps its input; the first one does not where no gradient goes below it.
    last_norm = norm_bytes(spec, adapted, way) if adapted.full_fine_tuning else 0.0
    token, pair, fixed = (sum(getattr(block, name) for block in blocks) for name in ("per_token", "per_pair", "fixed"))
    return SavedActivations(token + last_norm, pair, fixed), largest


def block_activations(
    spec: ModelSpec, weights: list[WeightSpec], adapted: TrainableParams, way: TrainingStep
) -> SavedActivations:
    """What stays of one block, as it is derived from its weights."""
    attention = [weight for weight in weights if weight.sublayer == "attention"]
    feed_forward = [weight for weight in weights if weight.sublayer == "mlp"]
    others = [weight for weight in weights if not weight.sublayer]
    inside, norm = _feed_forward(spec, feed_forward, adapted, way), norm_bytes(spec, adapted, way)
    token = spec.norms * norm
    if spec.head_norms:
        first = next(iter(spec.blocks.values()), [])
        query = next((one.inner for one in first if one.sublayer == "attention" and part(one) == "closes"), spec.hidden)
        token += norm * (query + spec.key_value) / spec.hidden
    token += _inputs(spec, [attention, feed_forward, others], adapted, way)
    token += _attention(spec, attention, way) + inside
    token += way.width * sum(weight.outer for weight in others if part(weight) == "opens")
    token += sum(_adapter(weight, adapted, way) * spec.used(weight) for weight in weights)
    token += 4.0 * _SCAN * spec.scan_states if others and spec.scan_states else 0.0
    merged = sum(weight.size for weight in weights if weight.fused and weight.path in adapted.ranks)
    pair, scores = _pairs(spec, way) if attention else (0.0, 0.0)
    return SavedActivations(token, pair, way.width * merged, inside + norm if scores else 0.0, scores)


def norm_bytes(spec: ModelSpec, adapted: TrainableParams, way: TrainingStep) -> float:
    """What one normalization over the hidden width keeps of a token."""
    wide = adapted.full_fine_tuning and way.autocast  # the hidden states are then in float32
    if (
        "rms_norm" in way.kernels
    ):  # the input as it is, and of each token one number: one over the root of its mean square
        return (4 if wide else way.width) * spec.hidden + 4.0
    each = way.width if spec.layer_norm and not way.autocast else 4
    # A trained scale needs the normalized input too.
    trained = 4 if wide else way.width * adapted.full_fine_tuning
    return float((each + trained) * spec.hidden)


def _pairs(spec: ModelSpec, way: TrainingStep) -> tuple[float, float]:
    """What attention keeps for each pair of tokens, and what its backward holds beside that (ATen: SoftMax.cu and
    SoftMaxKernel.cpp; docs/planning.md, Eager attention)."""
    if way.attention != "eager":
        # torch turns the mask of bits into numbers, in every layer anew
        return way.width * (way.masked and way.attention == "sdpa"), 0.0
    rounded = way.width if way.width < 4 else 0
    saved = 4 + rounded + way.width * spec.soft_capped
    backward = 4 + (4 if way.on_gpu else 0) + (2 if way.dtype == "float16" and way.on_gpu else 4) - rounded
    return spec.heads * saved, spec.heads * backward


def _inputs(spec: ModelSpec, halves: list[list[WeightSpec]], adapted: TrainableParams, way: TrainingStep) -> float:
    """The hidden states that opening layers keep, once for each half; halves that share one norm share them."""
    total = 0.0
    for half in halves:
        opening = [weight for weight in half if part(weight) == "opens"]
        if any(_keeps_input(weight, adapted, way) for weight in opening):
            uses = [spec.used(weight) for weight in opening]
            # In full fine-tuning under autocast each layer rounds the hidden states to half precision for itself.
            copies = sum(uses) if adapted.full_fine_tuning and way.autocast else max(uses)
            total += way.width * spec.hidden * copies
    return min(total, way.width * spec.hidden) if spec.norms == 1 else total


def _keeps_input(weight: WeightSpec, adapted: TrainableParams, way: TrainingStep) -> bool:
    own = weight.path in adapted.ranks
    alone = own and (
        (way.written_out and way.dropout > 0) or way.copies
    )  # it then keeps a copy of its own, counted with the adapter
    return (own and not alone) or adapted.full_fine_tuning or (way.keeps_inputs and not weight.fused)


def _attention(spec: ModelSpec, weights: list[WeightSpec], way: TrainingStep) -> float:
    """Queries, keys, values and the output; the scores' normalizers are 4 bytes a head."""
    if not weights:
        return 0.0
    output = next((weight.inner for weight in weights if part(weight) == "closes"), spec.hidden)
    opening = [weight for weight in weights if part(weight) == "opens" and weight.inner == spec.hidden]
    opened = sum(weight.outer for weight in opening)
    repeated = way.attention == "eager" or (way.masked and way.attention == "sdpa")
    # A single head of keys is seen by all queries as it is; others are copied for those that share them.
    if repeated and spec.key_value * spec.heads > output > spec.key_value:
        opened += 2 * (output - spec.key_value)
    elif len(opening) == 1:  # the values are a view of the product, which stays as a whole beside what is rotated
        opened += output + spec.key_value
    if way.attention == "varlen" and not way.on_gpu:  # the output of each row, and all in one
        opened += output
    return way.width * (opened + output) + 4 * spec.heads


def _feed_forward(spec: ModelSpec, weights: list[WeightSpec], adapted: TrainableParams, way: TrainingStep) -> float:
    opening = [weight for weight in weights if part(weight) == "opens" and not weight.skip_reason]
    total = 0.0
    for weight in weights:
        if part(weight) != "closes" or weight.skip_reason:
            continue
        width = weight.inner
        own = [one.outer for one in opening if one.fused == weight.fused and one.outer in (width, 2 * width)]
        gated, keeps_input = sum(own) >= 2 * width, _keeps_input(weight, adapted, way)
        by_kernel = gated and not weight.fused and not {"swiglu", "geglu"}.isdisjoint(way.kernels)
        numbers = min(sum(own), 2 * width) + (0 if by_kernel else width * (spec.activation - 1))
        # the activated gate, or what went through the activation
        numbers += width if not by_kernel and (gated or keeps_input) else 0
        numbers += width if gated and keeps_input else 0  # its product with up
        numbers += spec.hidden if weight.fused else 0  # each expert's result is weighted before it is added
        total += spec.used(weight) * way.width * numbers
    return total


def _adapter(weight: WeightSpec, adapted: TrainableParams, way: TrainingStep) -> float:
    """What an adapter keeps besides the input of its layer: in lorakit's own function the mask of dropout, and of DoRA
    W x (lorakit/model/lora_function.py, dora.py)."""
    rank = adapted.ranks.get(weight.path, 0)
    if not rank:
        return 0.0
    if not way.written_out:
        return float(weight.inner * (way.dropout > 0 and not weight.fused) + weight.outer * way.width * adapted.dora)
    total = float(way.width * rank)
    if way.dropout > 0:
        total += weight.inner * (way.width + (1 if way.on_gpu else way.width))
    elif way.copies:
        total += weight.inner * 4
    if adapted.dora:
        total += weight.outer * way.width * 2
    return total


def spec_with_trace(config: Path | dict[str, Any], settings: Adapter) -> ModelSpec:
    """The spec of a model that is not counted from its config, with what the derivation of activations misses: it hangs
    little on the adapter, and is looked at with what comes nearest to the recipe's. `config`: a model's folder, or what
    is in its config.json; a `UserError` where it is of no causal language model."""
    from lorakit.model.spec_from_meta import read_hf_config, spec_from_meta  # torch and transformers

    spec = spec_from_meta(config)
    # Plain LoRA, DoRA or full fine-tuning of the same modules, in all layers.
    same = {name: getattr(settings, name) for name in ("rank", "dropout", "targets", "exclude")}
    near = Adapter.model_validate({"kind": settings.kind if settings.kind in ("dora", "none") else "lora", **same})
    reason = ""
    missed: dict[bool, dict[tuple[int, int], tuple[float, float]]] = {True: {}, False: {}}
    for is_half in missed:
        try:
            missed[is_half] = _missed(read_hf_config(config), spec, near, is_half)
        except LorakitError as error:
            reason = str(error)
    half, whole = missed[True], missed[False]
    if not whole:  # fused experts have code of their own for float32, which cannot always be followed
        whole = {(number, 4): (2 * token, 0.0) for (number, _), (token, _) in half.items()}
    return replace(spec, extra_bytes=half | whole, untraced="" if half or whole else reason)


def _missed(config: Any, spec: ModelSpec, settings: Adapter, half: bool) -> dict[tuple[int, int], tuple[float, float]]:
    from lorakit.model.activation_trace import trace_activations

    attention, bytes_by_block = trace_activations(config, spec, settings, half)
    adapted, missed = count_trainable(spec, settings), {}
    dtype, dropout = "bfloat16" if half else "float32", settings.dropout
    way = TrainingStep(1, 1, 1, dtype, attention=attention, dropout=dropout, on_gpu=False)
    for number, (token, pair) in bytes_by_block.items():
        derived = block_activations(spec, spec.blocks[number], adapted, way)
        missed[number, way.width] = token - derived.per_token, pair - derived.per_pair
    return missed
