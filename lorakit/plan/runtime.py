"""How long a training run takes and what it costs: operations, memory traffic and kernel starts, from plain numbers.

A micro-batch passes through the blocks two or three times: forward, backward, and forward again with gradient
checkpointing, the last two only through the blocks that a gradient goes back to. Each pass multiplies matrices, moves
activations between the multiplications, dequantizes weights, and starts kernels. docs/planning.md has the sources of
every number here, and predicted against published times.
"""

from dataclasses import dataclass

from lorakit.hardware.throughput import Throughput
from lorakit.plan.flops import DoraWorkload, Workload

# Numbers read and written a token and layer between the products, from the operations of transformers' Llama block:
# per number of the hidden width (two norms with their casts, residuals, rotation of queries), and per number of the
# layer's inputs and outputs summed (which the block's weights over the hidden width come close to).
_HIDDEN_ACCESSES, _WIDTH_ACCESSES = 60, 2.7
# In float32 the norms cast nothing.
_HIDDEN_ACCESSES_FLOAT32 = 38
# The same of an adapter on every linear layer: each input is read again, and each output scaled and added.
_ADAPTER_HIDDEN_ACCESSES, _ADAPTER_WIDTH_ACCESSES = 12, 3
# The backward pass moves about twice what the forward pass does.
_BACKWARD = 2
# Kernels a layer and pass forward: the block's own, those of an adapter on each linear layer, and of dequantizing.
_KERNELS, _ADAPTER_KERNELS, _QUANTIZED_KERNELS = 80, 35, 85
# DoRA's bytes and kernels, counted operation by operation from the code that work.Dora names. Its norm: PEFT makes an
# identity in float32 and rounds it (10 bytes a number), and of each weight makes B A, its cast, W's cast, the scaled
# product, the sum and the norm (38). lorakit's norm makes nothing of a weight's size.
_IDENTITY_BYTES, _BUILT_BYTES = 10, 38
# Its outputs, forward, beside what an adapter's scaled and added output takes: bytes a number, built and not; backward
# twice and three times that. Kernels a layer for the norm, and for the outputs forward.
_BUILT_OUTPUT_BYTES, _OUTPUT_BYTES = 38, 8
_OUTPUT_BACKWARD = 3
_NORM_KERNELS, _OUTPUT_KERNELS = 10, 6
# Bytes that dequantizing one weight reads and writes: 4 bits with their scale, or 8; two bytes out.
_DEQUANTIZED_BYTES = {"nf4": 2.56, "q4": 2.56, "q8": 3.0}
# bitsandbytes' 4-bit kernels reach this share of the bandwidth that plain traffic reaches (LitGPT's tables).
_DEQUANTIZING_SHARE = 0.45
# LLM.int8 splits outliers off and quantizes activations around each product: an A100 took 52 s where 16 bits took 22
# (h2oai/h2ogpt#128); newer versions of bitsandbytes take less.
_INT8_FACTOR = 2.0
# Bytes the optimizer moves a trained number: weight, two states and gradient in float32, clipping, setting to zero.
_OPTIMIZER_BYTES = 40
# From this many logits on the head is computed anew in the backward pass (lorakit/model/loss.py).
_CHUNK_LOGITS = 1 << 25
# The estimate is times these, low and high: what the published runs in docs/planning.md differ by.
LOW, HIGH = 0.6, 1.7


@dataclass(frozen=True)
class EstimateRange:
    """An estimate with the range that it should lie in."""

    low: float
    likely: float
    high: float


def training_flops(work: Workload) -> float:
    """FLOPs of the whole run: what the arithmetic needs, whatever the device.

    Two a weight and token forward, two for the gradient of the inputs, two for that of trained weights, two more where
    checkpointing computes the block again. Attention is causal: half of length squared.
    """
    again = 1 if work.checkpointing else 0
    back = _share_back(work)
    twice = work.dora.twice if work.dora else 0
    body = work.body * (2 + (2 + 2 * again) * back) + 2 * work.trained_body
    body += work.adapter * (6 + 2 * again) + twice * (4 + 2 * again)
    attention = work.attention * (2 + (4 + 2 * again) * back)
    head = work.head * (4 + (2 if _head_again(work) else 0) + (2 if work.trained_head else 0))
    training = work.tokens * body + work.square_tokens * attention + work.trained_tokens * head
    held_out = work.held_out_tokens * (work.body + work.adapter) + work.held_out_trained_tokens * work.head
    return float(training + 2 * held_out)


def training_seconds(work: Workload, rates: Throughput) -> EstimateRange:
    """Seconds that the steps and the scoring of held-out rows take; loading and preparing are not in it."""
    tokens = work.tokens + work.held_out_tokens / _passes(work)
    share = tokens / work.tokens if work.tokens else 1.0  # held-out rows go through in batches like the others
    computing = max(_products(work, rates), share * _reading(work, rates))
    moving = _traffic(work, rates) + share * _dequantizing(work, rates)
    starting = share * _starting(work, rates)
    on_device = computing + moving + share * (_norms(work.dora, work, rates) if work.dora else 0.0)
    micro_batches = max(on_device, starting) if rates.queued else on_device + starting
    optimizer = work.steps * work.optimizer_numbers * _OPTIMIZER_BYTES / rates.bandwidth
    likely = micro_batches + optimizer
    return EstimateRange(LOW * likely, likely, HIGH * likely)


def training_price(span: EstimateRange, per_hour: float) -> EstimateRange:
    """What seconds cost at a price an hour, in its currency."""
    return EstimateRange(*(per_hour * part / 3600 for part in (span.low, span.likely, span.high)))


def _head_again(work: Workload) -> bool:
    logits = work.trained_tokens / max(work.micro_batches, 1) * work.head / work.hidden
    return logits > _CHUNK_LOGITS


def _share_back(work: Workload) -> float:
    """The share of the blocks that a gradient goes back through: only these are computed again, too."""
    return work.layers_back / work.layers


def _forwards(work: Workload) -> int:
    """How often a block that a gradient goes back through is computed forward."""
    return 2 if work.checkpointing else 1


def _passes(work: Workload) -> float:
    """How often a micro-batch uses each frozen weight, on average."""
    return 1 + _share_back(work) * _forwards(work)


def _products(work: Workload, rates: Throughput) -> float:
    factor = _INT8_FACTOR if work.quantization == "q8" and rates.queued else 1.0
    return factor * training_flops(work) / rates.compute


def _reading(work: Workload, rates: Throughput) -> float:
    """Reading the weights for the products: what a pass takes at least, however few its tokens."""
    held = work.weight_numbers * rates.number_bytes if work.weight_numbers else work.weight_bytes
    read = max(held, (work.body + work.head) * rates.number_bytes)  # `held`: of all experts, which a batch uses
    return work.micro_batches * _passes(work) * read / rates.bandwidth


def _traffic(work: Workload, rates: Throughput) -> float:
    """Moving activations between the products."""
    width = work.body / work.layers / work.hidden
    hidden = _HIDDEN_ACCESSES_FLOAT32 if rates.number_bytes == 4 else _HIDDEN_ACCESSES
    plain = hidden * work.hidden + _WIDTH_ACCESSES * width
    adapter = _ADAPTER_HIDDEN_ACCESSES * work.hidden + _ADAPTER_WIDTH_ACCESSES * width
    again = _forwards(work) - 1
    forward = work.layers * plain + work.layers_adapted * adapter
    back = work.layers_back * plain + work.layers_adapted * adapter
    numbers = (work.tokens + work.held_out_tokens) * forward + work.tokens * (again + _BACKWARD) * back
    return (numbers * rates.number_bytes + _scaled(work)) / rates.bandwidth


def _scaled(work: Workload) -> float:
    """Bytes of the outputs that DoRA scales."""
    if not work.dora:
        return 0.0
    if work.dora.built:
        forward, backward = _BUILT_OUTPUT_BYTES, _BACKWARD * _BUILT_OUTPUT_BYTES
    else:
        forward, backward = _OUTPUT_BYTES, _OUTPUT_BACKWARD * _OUTPUT_BYTES
    passes = work.tokens * (_forwards(work) * forward + backward) + work.held_out_tokens * forward
    return work.dora.outputs * passes


def _norms(dora: DoraWorkload, work: Workload, rates: Throughput) -> float:
    """Taking the norms of DoRA's weights: in each pass where they are built, else once, until the adapter changes."""
    once = 2 * dora.norm / rates.compute
    if not dora.built:
        return work.micro_batches * once
    made = float(dora.weights * _BUILT_BYTES + dora.identities * _IDENTITY_BYTES)
    if work.weight_numbers:  # PEFT dequantizes the weight once more for its norm
        made += dora.weights * _DEQUANTIZED_BYTES[work.quantization] / _DEQUANTIZING_SHARE
    return work.micro_batches * _forwards(work) * (once + made / rates.bandwidth)


def _dequantizing(work: Workload, rates: Throughput) -> float:
    if not work.weight_numbers:
        return 0.0
    each = _DEQUANTIZED_BYTES[work.quantization] / (rates.bandwidth * _DEQUANTIZING_SHARE)
    return work.micro_batches * _passes(work) * work.weight_numbers * each


def _starting(work: Workload, rates: Throughput) -> float:
    plain = _KERNELS + (_QUANTIZED_KERNELS if work.weight_numbers else 0)
    back = _forwards(work) - 1 + _BACKWARD
    kernels = plain * (work.layers + work.layers_back * back) + _ADAPTER_KERNELS * work.layers_adapted * (1 + back)
    if work.dora:
        norms = _forwards(work) if work.dora.built else 1
        kernels += work.dora.modules * (_NORM_KERNELS * norms + _OUTPUT_KERNELS * (1 + back))
    return work.micro_batches * kernels * rates.start
