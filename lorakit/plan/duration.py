"""How long a training run takes and what it costs: operations, memory traffic and kernel starts, from plain numbers.

A micro-batch passes through the blocks two or three times (forward, backward, and forward again with gradient
checkpointing). Each pass multiplies matrices, moves activations between the multiplications, dequantizes weights, and
starts kernels. docs/planning.md has the sources of every number here, and predicted against published times.
"""

from dataclasses import dataclass

from lorakit.plan.rates import Rates

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
class Work:
    """One training run, in numbers."""

    steps: int
    micro_batches: int
    """Of the whole run."""
    tokens: int
    """That go through the body over the whole run, padding included."""
    square_tokens: float
    """Sum over rows of length squared."""
    trained_tokens: int
    """Positions at which the head is computed."""
    body: int
    """Weights of the blocks that each token is multiplied with: of experts the active ones."""
    head: int
    """Hidden width x vocabulary."""
    adapter: int
    """Trained numbers of the adapter that each token is multiplied with; 0 for full fine-tuning."""
    attention: int
    """Layers x query width."""
    weight_bytes: int
    """Of the frozen weights as they are held."""
    weight_numbers: int
    """Quantized weights, which are dequantized at each use; 0 without quantization."""
    quantization: str
    """none, q8, q4 or nf4."""
    trains_weights: bool
    """Full fine-tuning."""
    checkpointing: bool
    optimizer_numbers: int
    """Numbers that the optimizer moves."""
    layers: int
    hidden: int
    """The width of the hidden states."""
    held_out_tokens: int = 0
    """That go forward through the body to score held-out rows, over all scorings of the run."""
    held_out_trained_tokens: int = 0


@dataclass(frozen=True)
class Span:
    """An estimate with the range that it should lie in."""

    low: float
    likely: float
    high: float


def operations(work: Work) -> float:
    """FLOPs of the whole run: what the arithmetic needs, whatever the device.

    Two a weight and token forward, two for the gradient of the inputs, two for that of trained weights, two more where
    checkpointing computes the block again. Attention is causal: half of length squared.
    """
    again = 2 if work.checkpointing else 0
    body = work.body * (4 + again + (2 if work.trains_weights else 0)) + work.adapter * (6 + again)
    attention = work.attention * (6 + again)
    head = work.head * (4 + (2 if _head_again(work) else 0) + (2 if work.trains_weights else 0))
    training = work.tokens * body + work.square_tokens * attention + work.trained_tokens * head
    held_out = work.held_out_tokens * (work.body + work.adapter) + work.held_out_trained_tokens * work.head
    return float(training + 2 * held_out)


def seconds(work: Work, rates: Rates) -> Span:
    """Seconds that the steps and the scoring of held-out rows take; loading and preparing are not in it."""
    tokens = work.tokens + work.held_out_tokens / _passes(work)
    share = tokens / work.tokens if work.tokens else 1.0  # held-out rows go through in batches like the others
    computing = max(_products(work, rates), share * _reading(work, rates))
    moving = _traffic(work, rates) + share * _dequantizing(work, rates)
    starting = share * _starting(work, rates)
    on_device = computing + moving
    micro_batches = max(on_device, starting) if rates.queued else on_device + starting
    optimizer = work.steps * work.optimizer_numbers * _OPTIMIZER_BYTES / rates.bandwidth
    likely = micro_batches + optimizer
    return Span(LOW * likely, likely, HIGH * likely)


def price(span: Span, per_hour: float) -> Span:
    """What seconds cost at a price an hour, in its currency."""
    return Span(*(per_hour * part / 3600 for part in (span.low, span.likely, span.high)))


def _head_again(work: Work) -> bool:
    logits = work.trained_tokens / max(work.micro_batches, 1) * work.head / work.hidden
    return logits > _CHUNK_LOGITS


def _passes(work: Work) -> int:
    """How often a micro-batch uses each frozen weight."""
    return 3 if work.checkpointing else 2


def _products(work: Work, rates: Rates) -> float:
    factor = _INT8_FACTOR if work.quantization == "q8" and rates.queued else 1.0
    return factor * operations(work) / rates.compute


def _reading(work: Work, rates: Rates) -> float:
    """Reading the weights for the products: what a pass takes at least, however few its tokens."""
    held = work.weight_numbers * rates.number_bytes if work.weight_numbers else work.weight_bytes
    read = max(held, (work.body + work.head) * rates.number_bytes)  # `held`: of all experts, which a batch uses
    return work.micro_batches * _passes(work) * read / rates.bandwidth


def _traffic(work: Work, rates: Rates) -> float:
    """Moving activations between the products."""
    width = work.body / work.layers / work.hidden
    hidden = _HIDDEN_ACCESSES_FLOAT32 if rates.number_bytes == 4 else _HIDDEN_ACCESSES
    accesses = hidden * work.hidden + _WIDTH_ACCESSES * width
    if work.adapter:
        accesses += _ADAPTER_HIDDEN_ACCESSES * work.hidden + _ADAPTER_WIDTH_ACCESSES * width
    passes = _passes(work) - 1 + _BACKWARD
    numbers = (work.tokens * passes + work.held_out_tokens) * work.layers * accesses
    return numbers * rates.number_bytes / rates.bandwidth


def _dequantizing(work: Work, rates: Rates) -> float:
    if not work.weight_numbers:
        return 0.0
    each = _DEQUANTIZED_BYTES[work.quantization] / (rates.bandwidth * _DEQUANTIZING_SHARE)
    return work.micro_batches * _passes(work) * work.weight_numbers * each


def _starting(work: Work, rates: Rates) -> float:
    kernels = _KERNELS + (_ADAPTER_KERNELS if work.adapter else 0) + (_QUANTIZED_KERNELS if work.weight_numbers else 0)
    passes = _passes(work) - 1 + _BACKWARD
    return work.micro_batches * work.layers * passes * kernels * rates.start
