"""How much a training run computes, how long that takes and what it costs: operations, memory traffic, kernel starts.

A micro-batch passes through the blocks two or three times: forward, backward, and forward again with gradient
checkpointing, the last two only through the blocks that a gradient goes back to. Each pass multiplies matrices, moves
activations between the multiplications, dequantizes weights, and starts kernels. docs/planning.md has the sources of
every number here, and predicted against published times.
"""

import math
from dataclasses import dataclass, replace

from lorakit.hardware.links import Link
from lorakit.hardware.machine import Throughput
from lorakit.model.logit_chunks import CHUNK_LOGITS, chunk_logits
from lorakit.model.spec import WeightSpec
from lorakit.plan.memory import DTYPE_BYTES, SizedRun, weight_bytes
from lorakit.plan.sharding import SHARED, Transfer, step_seconds

# The share of tokens that are trained, where no row is known.
TRAINED_SHARE = 0.5
# Numbers read and written a token and layer between the products, from the operations of transformers' Llama block:
# per number of the hidden width (two norms with their casts, residuals, rotation of queries), and per number of the
# layer's inputs and outputs summed (which the block's weights over the hidden width come close to).
_HIDDEN_ACCESSES, _WIDTH_ACCESSES = 60, 2.7
_HIDDEN_ACCESSES_FLOAT32 = 38  # whose norms cast nothing
# What Liger-Kernel's kernels leave of these: each norm then reads and writes its states once (16 accesses fewer with
# its casts), queries and keys are rotated in one pass (8 fewer), and gate and up are read once, together.
_KERNELS_HIDDEN_ACCESSES, _KERNELS_HIDDEN_ACCESSES_FLOAT32, _KERNELS_WIDTH_ACCESSES = 20, 16, 2.2
# The same of an adapter on every linear layer: each input is read again, and each output scaled and added.
_ADAPTER_HIDDEN_ACCESSES, _ADAPTER_WIDTH_ACCESSES = 12, 3
_BACKWARD = 2  # the backward pass moves about twice what the forward pass does
# Kernels a layer and pass forward: the block's own, those of an adapter on each linear layer, and of dequantizing.
_KERNELS, _ADAPTER_KERNELS, _QUANTIZED_KERNELS = 80, 35, 85
# The block's own where Liger's take over: a norm is one kernel for seven, the rotation one for eleven, a gate one for
# two.
_KERNELS_WITH_LIGER = 57
# DoRA's norms where rows of W + s B A are built: bytes a number of the weight read and written, in float32 but for W.
_NORM_BYTES = 18
# Its outputs beside what an adapter's added output takes: numbers read and written forward, and backward times that.
_OUTPUT_ACCESSES, _OUTPUT_BACKWARD = 2, 3
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
class DoraWorkload:
    """What DoRA adds to a LoRA (lorakit/model/dora.py): the norm of each row of W + s B A, once a micro-batch, and
    outputs that are scaled by it. In float32 on a processor the norm follows from W A^T; elsewhere rows of the sum are
    built. With dropout a token is multiplied with W twice: of what went in and of what was left."""

    layers: list[tuple[int, int, int]]  # rank, and features that go in and come out, of each adapted layer
    built: bool  # whether rows of the sum are built
    dropout: bool

    @property
    def numbers(self) -> int:
        """Numbers of the adapted weights."""
        return sum(inner * outer for _, inner, outer in self.layers)


@dataclass(frozen=True)
class Workload:
    """One training run, in numbers."""

    steps: int
    micro_batches: int  # of the whole run
    tokens: int  # that go through the body over the whole run, padding included
    square_tokens: float  # sum over rows of length squared
    trained_tokens: int  # positions at which the head is computed
    body: int  # weights of the blocks that each token is multiplied with: of experts the active ones
    head: int  # hidden width x vocabulary
    adapter: int  # trained numbers of the adapter that each token is multiplied with; 0 for full fine-tuning
    attention: int  # layers x query width
    weight_bytes: int  # of the frozen weights as they are held
    weight_numbers: int  # quantized weights, which are dequantized at each use; 0 without quantization
    quantization: str  # none, q8, q4 or nf4
    checkpointing: bool
    optimizer_numbers: int  # numbers that the optimizer moves
    layers: int
    layers_back: int  # blocks that a gradient goes back through: from the first trained one on
    layers_adapted: int  # blocks that hold an adapter
    hidden: int  # the width of the hidden states
    trained_body: int = 0  # weights of the body that are trained themselves: full fine-tuning
    trained_head: bool = False
    dora: DoraWorkload | None = None
    chunk: int = CHUNK_LOGITS  # logits that are held at once
    offloaded: int = 0  # bytes of activations that go to main memory and back, over the run
    held_out_tokens: int = 0  # that go forward through the body to score held-out rows, over all scorings of the run
    held_out_trained_tokens: int = 0
    kernels: bool = False  # whether kernels take the place of the blocks' own code

    @property
    def forwards(self) -> int:
        """How often a block that a gradient goes back through is computed forward."""
        return 2 if self.checkpointing else 1

    @property
    def passes(self) -> float:
        """How often a micro-batch uses each frozen weight, on average."""
        return 1 + self.layers_back / self.layers * self.forwards


def training_flops(work: Workload) -> float:
    """FLOPs of the whole run: what the arithmetic needs, whatever the device."""
    return sum(flops_by_part(work).values())


def flops_by_part(work: Workload) -> dict[str, float]:
    """The FLOPs of the whole run by what takes them. Two a weight and token forward, two for the gradient of the
    inputs, two for that of trained weights, two more where checkpointing computes the block again. Attention is causal:
    half of length squared."""
    again, back = work.forwards - 1, work.layers_back / work.layers
    twice = work.dora.numbers if work.dora and work.dora.dropout else 0
    logits = work.trained_tokens / max(work.micro_batches, 1) * work.head / work.hidden
    head_again = 2 if work.trained_head and logits > work.chunk else 0
    held_out = work.held_out_tokens * (work.body + work.adapter) + work.held_out_trained_tokens * work.head
    recomputed = again * (work.tokens * 2 * (back * work.body + work.adapter + twice))
    recomputed += again * 2 * work.square_tokens * back * work.attention + work.trained_tokens * head_again * work.head
    return {
        "body, forward": float(work.tokens * 2 * work.body),
        "body, gradients of inputs": float(work.tokens * 2 * back * work.body),
        "body, gradients of weights": float(work.tokens * 2 * work.trained_body),
        "adapter": float(work.tokens * (6 * work.adapter + 4 * twice)),
        "attention": float(work.square_tokens * work.attention * (2 + 4 * back)),
        "head": float(work.trained_tokens * work.head * (6 if work.trained_head else 4)),
        "computed again": float(recomputed),
        "held-out rows": float(2 * held_out),
    }


def run_workload(
    load: SizedRun,
    micro_batches: float,
    checkpointing: bool,
    *,
    length: float,
    trained: float = TRAINED_SHARE,
    steps: int = 1,
    padding: float = 0.0,
    held_out: int = 0,
) -> Workload:
    """A run of so many steps in the numbers that its time hangs on: each in so many micro-batches, on average, of rows
    of `length` tokens on average, of which the share `trained` has a loss. `padding`: the share of computed tokens that
    are none of a row; `held_out`: tokens that are scored over the whole run."""
    recipe, spec, adapted = load.recipe, load.spec, load.trainable
    examples = steps * recipe.train.batch_size
    numbers = sum(weight.size for weight in spec.quantizable) if load.quantization != "none" else 0
    width = 4 if adapted.full_fine_tuning else DTYPE_BYTES[recipe.model.dtype]
    query = max((weight.inner for weight in spec.weights if weight.sublayer == "attention"), default=spec.hidden)
    layers = [(adapted.ranks[one.path], one.inner, one.outer) for one in spec.weights if one.path in adapted.ranks]
    trained_body = 0
    if adapted.full_fine_tuning:
        in_blocks = sum(weight.size for block in spec.blocks.values() for weight in block)
        trained_body = round(spec.active_numbers * min(1.0, adapted.whole / in_blocks))
    return Workload(
        steps=steps,
        micro_batches=max(steps, round(steps * micro_batches)),
        tokens=round(examples * length / (1 - padding)),
        square_tokens=float(examples * length**2),
        trained_tokens=round(examples * length * trained),
        body=spec.active_numbers,
        head=spec.hidden * spec.vocabulary,
        adapter=0 if adapted.full_fine_tuning else adapted.matrices,
        attention=spec.layers * query,
        weight_bytes=weight_bytes(spec, load.quantization, recipe.model.double_quant, width),
        weight_numbers=numbers,
        quantization=load.quantization,
        checkpointing=checkpointing,
        optimizer_numbers=adapted.trained,
        layers=spec.layers,
        layers_back=spec.layers - adapted.first_block,
        layers_adapted=len({WeightSpec(path, "").layer for path in adapted.ranks}),
        hidden=spec.hidden,
        trained_body=trained_body,
        trained_head=adapted.full_fine_tuning and adapted.whole == spec.parameters,
        dora=DoraWorkload(layers, width < 4 or load.on_gpu, recipe.adapter.dropout > 0) if adapted.dora else None,
        chunk=chunk_logits(load.card),
        offloaded=load.offloaded(examples, length, checkpointing),
        held_out_tokens=held_out,
        held_out_trained_tokens=round(held_out * trained),
        kernels=bool(load.kernels),
    )


def workload_of_one(work: Workload, load: SizedRun) -> Workload:
    """What the device does of a run that has the most rows of it, where several share out the rows of each step."""
    if load.devices.count == 1:
        return work
    share, count = load.rows / load.recipe.train.batch_size, load.devices.count
    divided = "optimizer" in SHARED[load.recipe.train.sharding, load.trainable.full_fine_tuning]
    return replace(
        work,
        micro_batches=max(work.steps, math.ceil(work.micro_batches / count)),
        tokens=round(share * work.tokens),
        square_tokens=share * work.square_tokens,
        trained_tokens=round(share * work.trained_tokens),
        offloaded=round(share * work.offloaded),
        optimizer_numbers=math.ceil(work.optimizer_numbers / (count if divided else 1)),
        held_out_tokens=math.ceil(work.held_out_tokens / count),
        held_out_trained_tokens=math.ceil(work.held_out_trained_tokens / count),
    )


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
    each = _DEQUANTIZED_BYTES[work.quantization] / _DEQUANTIZING_SHARE / rates.bandwidth if work.weight_numbers else 0.0
    dequantizing = work.micro_batches * work.passes * work.weight_numbers * each
    on_device = max(products, share * _reading(work, rates)) + (_traffic(work, rates) + share * dequantizing)
    on_device += share * _dora_norms(work, rates)
    starting = share * _starting(work, rates)
    likely = max(on_device, starting) if rates.queued else on_device + starting
    if work.offloaded:  # there and back, while the device computes
        likely = max(likely, 2 * work.offloaded / rates.link)
    likely += work.steps * work.optimizer_numbers * _OPTIMIZER_BYTES / rates.bandwidth
    return EstimateRange(LOW * likely, likely, HIGH * likely)


def seconds_together(computing: EstimateRange, work: Workload, sent: tuple[Transfer, ...], link: Link) -> EstimateRange:
    """Seconds of the steps of devices of which the busiest computes for so long, with what they send in each step."""
    likely = work.steps * step_seconds(computing.likely / work.steps, sent, link)
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
    if work.kernels:
        hidden = _KERNELS_HIDDEN_ACCESSES_FLOAT32 if rates.number_bytes == 4 else _KERNELS_HIDDEN_ACCESSES
        plain = hidden * work.hidden + _KERNELS_WIDTH_ACCESSES * width
    adapter = _ADAPTER_HIDDEN_ACCESSES * work.hidden + _ADAPTER_WIDTH_ACCESSES * width
    forward = work.layers * plain + work.layers_adapted * adapter
    back = work.layers_back * plain + work.layers_adapted * adapter
    numbers = (work.tokens + work.held_out_tokens) * forward + work.tokens * (work.forwards - 1 + _BACKWARD) * back
    if work.dora:
        outputs = sum(outer for _, _, outer in work.dora.layers) * _OUTPUT_ACCESSES
        numbers += outputs * (work.tokens * (work.forwards + _OUTPUT_BACKWARD) + work.held_out_tokens)
    return numbers * rates.number_bytes / rates.bandwidth


def _dora_norms(work: Workload, rates: Throughput) -> float:
    """Taking the norms of DoRA's weights, once a micro-batch: with gradient checkpointing too."""
    if not work.dora:
        return 0.0
    products = sum(rank * inner * outer for rank, inner, outer in work.dora.layers)
    moved = work.dora.numbers * _NORM_BYTES if work.dora.built else 0
    return work.micro_batches * (2 * products / rates.compute + moved / rates.bandwidth)


def _starting(work: Workload, rates: Throughput) -> float:
    """Starting the kernels."""
    plain = (_KERNELS_WITH_LIGER if work.kernels else _KERNELS) + (_QUANTIZED_KERNELS if work.weight_numbers else 0)
    back = work.forwards - 1 + _BACKWARD
    kernels = plain * (work.layers + work.layers_back * back) + _ADAPTER_KERNELS * work.layers_adapted * (1 + back)
    if work.dora:
        kernels += len(work.dora.layers) * (_NORM_KERNELS + _OUTPUT_KERNELS * (1 + back))
    return work.micro_batches * kernels * rates.start
