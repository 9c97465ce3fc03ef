"""How long a training run takes and what it costs: operations, memory traffic and kernel starts, from plain numbers.

A micro-batch passes through the blocks two or three times: forward, backward, and forward again with gradient
checkpointing, the last two only through the blocks that a gradient goes back to. Each pass multiplies matrices, moves
activations between the multiplications, dequantizes weights, and starts kernels. docs/planning.md has the sources of
every number here, and predicted against published times.
"""

from dataclasses import dataclass

from lorakit.hardware.throughput import Throughput
from lorakit.plan.flops import Workload, training_flops

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
# The estimate is times these, low and high: what the published runs in docs/planning.md differ by.
LOW, HIGH = 0.6, 1.7


@dataclass(frozen=True)
class EstimateRange:
    """An estimate with the range that it should lie in."""

    low: float
    likely: float
    high: float


def training_seconds(work: Workload, rates: Throughput) -> EstimateRange:
    """Seconds that the steps and the scoring of held-out rows take, without loading and preparing."""
    tokens = work.tokens + work.held_out_tokens / work.passes
    share = tokens / work.tokens if work.tokens else 1.0  # held-out rows go through in batches like the others
    factor = _INT8_FACTOR if work.quantization == "q8" and rates.queued else 1.0
    products = factor * training_flops(work) / rates.compute
    on_device = max(products, share * _reading(work, rates)) + (
        _traffic(work, rates) + share * _dequantizing(work, rates)
    )
    on_device += share * _dora_norms(work, rates)
    starting = share * _starting(work, rates)
    micro_batches = max(on_device, starting) if rates.queued else on_device + starting
    optimizer = work.steps * work.optimizer_numbers * _OPTIMIZER_BYTES / rates.bandwidth
    likely = micro_batches + optimizer
    return EstimateRange(LOW * likely, likely, HIGH * likely)


def training_price(time: EstimateRange, per_hour: float) -> EstimateRange:
    """What seconds cost at a price an hour, in its currency."""
    return EstimateRange(*(per_hour * seconds / 3600 for seconds in (time.low, time.likely, time.high)))


def _reading(work: Workload, rates: Throughput) -> float:
    """Reading the weights for the products: what a pass takes at least, however few its tokens."""
    stored = work.weight_numbers * rates.number_bytes if work.weight_numbers else work.weight_bytes
    read = max(stored, (work.body + work.head) * rates.number_bytes)  # `stored`: of all experts, which a batch uses
    return work.micro_batches * work.passes * read / rates.bandwidth


def _traffic(work: Workload, rates: Throughput) -> float:
    """Moving activations between the products, and the outputs that DoRA scales."""
    width = work.body / work.layers / work.hidden
    hidden = _HIDDEN_ACCESSES_FLOAT32 if rates.number_bytes == 4 else _HIDDEN_ACCESSES
    plain = hidden * work.hidden + _WIDTH_ACCESSES * width
    adapter = _ADAPTER_HIDDEN_ACCESSES * work.hidden + _ADAPTER_WIDTH_ACCESSES * width
    forward = work.layers * plain + work.layers_adapted * adapter
    back = work.layers_back * plain + work.layers_adapted * adapter
    numbers = (work.tokens + work.held_out_tokens) * forward + work.tokens * (work.forwards - 1 + _BACKWARD) * back
    scaled = 0.0
    if work.dora:
        per_pass = _BUILT_OUTPUT_BYTES if work.dora.built else _OUTPUT_BYTES
        backward = (_BACKWARD if work.dora.built else _OUTPUT_BACKWARD) * per_pass
        passes = work.tokens * (work.forwards * per_pass + backward) + work.held_out_tokens * per_pass
        scaled = work.dora.outputs * passes
    return (numbers * rates.number_bytes + scaled) / rates.bandwidth


def _dora_norms(work: Workload, rates: Throughput) -> float:
    """Taking the norms of DoRA's weights: in each pass where they are built, else once, until the adapter changes."""
    if not work.dora:
        return 0.0
    once = 2 * work.dora.norm / rates.compute
    if not work.dora.built:
        return work.micro_batches * once
    moved = float(work.dora.weights * _BUILT_BYTES + work.dora.identities * _IDENTITY_BYTES)
    if work.weight_numbers:  # PEFT dequantizes the weight once more for its norm
        moved += work.dora.weights * _DEQUANTIZED_BYTES[work.quantization] / _DEQUANTIZING_SHARE
    return work.micro_batches * work.forwards * (once + moved / rates.bandwidth)


def _dequantizing(work: Workload, rates: Throughput) -> float:
    if not work.weight_numbers:
        return 0.0
    each = _DEQUANTIZED_BYTES[work.quantization] / (rates.bandwidth * _DEQUANTIZING_SHARE)
    return work.micro_batches * work.passes * work.weight_numbers * each


def _starting(work: Workload, rates: Throughput) -> float:
    """Starting the kernels."""
    plain = _KERNELS + (_QUANTIZED_KERNELS if work.weight_numbers else 0)
    back = work.forwards - 1 + _BACKWARD
    kernels = plain * (work.layers + work.layers_back * back) + _ADAPTER_KERNELS * work.layers_adapted * (1 + back)
    if work.dora:
        norms = work.forwards if work.dora.built else 1
        kernels += work.dora.modules * (_NORM_KERNELS * norms + _OUTPUT_KERNELS * (1 + back))
    return work.micro_batches * kernels * rates.start
