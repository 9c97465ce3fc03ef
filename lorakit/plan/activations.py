"""What autograd keeps of one pass through the blocks, in bytes: what each operation saves for its backward.

With h the hidden width, b the bytes of a number in the arithmetic, and counting per token (transformers' modeling
files, PEFT's layers, torch's derivatives):

- RMSNorm computes in float32 and keeps its input so: 4h; LayerNorm keeps b h, under autocast 4h;
- a frozen linear layer keeps nothing; one that is trained or has an adapter keeps its input, once for all that share
  it;
- attention keeps queries, keys, values and its output, and in eager form the scores of every pair of tokens twice;
- a gated feed-forward keeps gate, activated gate and up; a plain one what goes into the activation;
- fused experts with an adapter are merged with it for each pass by PEFT, and the merged weights kept;
- a state space layer's scan, written out in torch, keeps four tensors of its states in float32;
- blocks below the first that has an adapter keep nothing: no gradient goes there;
- A's output, for the gradient of B; with dropout the dropped input and its mask; DoRA the outputs that it scales.

Checkpointing keeps the input of each block, and one block as above while its backward runs.
"""

from dataclasses import dataclass

from lorakit.model.skeleton import Skeleton, part
from lorakit.model.weight import Weight
from lorakit.plan.adapted import Adapted

# Tokens of a row at which blocks that differ are compared.
_A_ROW = 1024
# Tensors of its states that the scan of a Mamba layer keeps in each step (transformers' slow path).
_SCAN = 4


@dataclass(frozen=True)
class Way:
    """How tokens are computed, as far as memory depends on it."""

    width: int
    """Bytes of a number: 4 in float32, 2 in half precision."""
    attention: str = "sdpa"
    masked: bool = True
    """Whether rows are padded: then keys and values are repeated for every head that shares them, but in flash form."""
    dropout: float = 0.0
    autocast: bool = True
    """Whether half precision comes from autocast over an adapter in float32."""
    on_gpu: bool = True
    keeps_inputs: bool = False
    """Whether every frozen linear layer keeps its input too, as int8 ones do."""
    copies: bool = False
    """Whether each adapted layer copies its input to float32: PEFT's own, outside of autocast."""
    dora: bool = False
    packed_qkv: bool = False
    """Whether queries, keys and values come out of one layer: the product then stays as a whole, and its input has one
    dropout for all of them."""


@dataclass(frozen=True)
class Kept:
    """What stays of a pass, in bytes: for each token, for each pair of tokens of a row, and once."""

    token: float
    pair: float
    fixed: float = 0.0
    """Whatever the tokens."""

    def of(self, rows: int, length: int) -> float:
        """Bytes for so many rows of so many tokens."""
        return rows * length * (self.token + self.pair * length) + self.fixed


def kept(skeleton: Skeleton, adapted: Adapted, way: Way) -> tuple[Kept, Kept]:
    """What stays of all blocks, and of the largest of them."""
    found: dict[tuple[int, tuple[int, ...]], Kept] = {}
    blocks = []
    for number, weights in skeleton.blocks.items():
        if number >= adapted.first_block:
            key = skeleton.shapes[number], tuple(adapted.ranks.get(weight.path, 0) for weight in weights)
            if key not in found:
                found[key] = _block(skeleton, weights, adapted, way)
            blocks.append(found[key])
    largest = max(blocks, key=lambda block: block.of(1, _A_ROW), default=Kept(0, 0))
    whole = Kept(*(sum(getattr(block, name) for block in blocks) for name in ("token", "pair", "fixed")))
    return whole, largest


def _block(skeleton: Skeleton, weights: list[Weight], adapted: Adapted, way: Way) -> Kept:
    attention = [weight for weight in weights if weight.half == "attention"]
    feed_forward = [weight for weight in weights if weight.half == "mlp"]
    others = [weight for weight in weights if not weight.half]
    token = _norms(skeleton, adapted, way)
    token += _inputs(skeleton, [attention, feed_forward, others], adapted, way)
    token += _attention(skeleton, attention, way)
    token += _feed_forward(skeleton, feed_forward, adapted, way)
    token += way.width * sum(weight.outer for weight in others if part(weight) == "opens")
    token += sum(_adapter(weight, adapted, way) * skeleton.used(weight) for weight in weights)
    if way.packed_qkv and way.dropout > 0:
        opening = [weight for weight in attention if part(weight) == "opens" and weight.path in adapted.ranks]
        token -= sum(weight.inner * (way.width + 1) for weight in opening[1:])
    pair = 0.0
    if attention and way.attention == "eager":
        pair = skeleton.heads * (4 + (way.width if way.width < 4 else 0))
    elif attention and way.masked and way.attention == "sdpa":
        pair = way.width  # torch turns the mask of bits into numbers, in every layer anew
    token += 4.0 * _SCAN * skeleton.scanned if others and skeleton.scanned else 0.0
    merged = sum(weight.size for weight in weights if weight.fused and weight.path in adapted.ranks)
    return Kept(token, pair, way.width * merged)


def _norms(skeleton: Skeleton, adapted: Adapted, way: Way) -> float:
    each = way.width if skeleton.layer_norm and not way.autocast else 4
    # A trained scale needs the normalized input, and full fine-tuning under autocast has its hidden states in float32.
    trained = 4 if adapted.everything and way.autocast else way.width * adapted.everything
    heads = 0
    if skeleton.head_norms:
        heads = (each + trained) * (_query(skeleton) + skeleton.key_value)
    return skeleton.norms * (each + trained) * skeleton.hidden + heads


def _query(skeleton: Skeleton) -> int:
    """The width of all queries together."""
    first = next(iter(skeleton.blocks.values()), [])
    closing = [weight.inner for weight in first if weight.half == "attention" and part(weight) == "closes"]
    return closing[0] if closing else skeleton.hidden


def _inputs(skeleton: Skeleton, halves: list[list[Weight]], adapted: Adapted, way: Way) -> float:
    """The hidden states that opening layers keep, once for each half; halves that share one norm share them."""
    kept = 0.0
    for half in halves:
        opening = [weight for weight in half if part(weight) == "opens"]
        if any(_keeps(weight, adapted, way) for weight in opening):
            shares = max((skeleton.used(weight) for weight in opening), default=1)
            if adapted.everything and way.autocast:  # each layer rounds the hidden states to half precision for itself
                shares = sum(skeleton.used(weight) for weight in opening)
            kept += way.width * skeleton.hidden * shares
    return min(kept, way.width * skeleton.hidden) if skeleton.norms == 1 else kept


def _keeps(weight: Weight, adapted: Adapted, way: Way) -> bool:
    own = weight.path in adapted.ranks
    alone = own and (way.dropout > 0 or way.copies)  # it then keeps a copy of its own, counted with the adapter
    return (own and not alone) or adapted.everything or (way.keeps_inputs and not weight.fused)


def _attention(skeleton: Skeleton, weights: list[Weight], way: Way) -> float:
    """Queries, keys, values and the output; the scores' normalizers are 4 bytes a head."""
    if not weights:
        return 0.0
    closing = next((weight for weight in weights if part(weight) == "closes"), None)
    output = closing.inner if closing else skeleton.hidden
    opened = sum(weight.outer for weight in weights if part(weight) == "opens" and weight.inner == skeleton.hidden)
    flash = way.attention == "flash_attention_2"
    if way.masked and not flash and 0 < skeleton.key_value < output:
        opened += 2 * (output - skeleton.key_value)
    if way.packed_qkv:
        opened += output + skeleton.key_value
    return way.width * (opened + output) + 4 * skeleton.heads


def _feed_forward(skeleton: Skeleton, weights: list[Weight], adapted: Adapted, way: Way) -> float:
    closing = [weight for weight in weights if part(weight) == "closes" and not weight.aside]
    opening = [weight for weight in weights if part(weight) == "opens" and not weight.aside]
    total = 0.0
    for weight in closing:
        own = [
            other
            for other in opening
            if other.fused == weight.fused and other.outer in (weight.inner, 2 * weight.inner)
        ]
        opened = sum(other.outer for other in own)
        gated = opened >= 2 * weight.inner
        inside = min(opened, 2 * weight.inner) + weight.inner * (skeleton.activation - 1)
        activated = weight.inner if gated or _keeps(weight, adapted, way) else 0
        product = weight.inner if gated and _keeps(weight, adapted, way) else 0
        total += skeleton.used(weight) * way.width * (inside + activated + product)
        if weight.fused:  # each expert's result is weighted before it is added
            total += skeleton.used(weight) * way.width * skeleton.hidden
    return total


def _adapter(weight: Weight, adapted: Adapted, way: Way) -> float:
    """What an adapter keeps besides the input of its layer."""
    rank = adapted.ranks.get(weight.path, 0)
    if not rank:
        return 0.0
    total = float(way.width * rank)
    if way.dropout > 0:
        total += weight.inner * (way.width + (1 if way.on_gpu else way.width))
    elif way.copies:
        total += weight.inner * 4
    if way.dora:
        total += weight.outer * way.width * (1 if way.width == 4 else 2)
    return total


def boundary(skeleton: Skeleton, adapted: Adapted, way: Way) -> int:
    """What checkpointing keeps of each token: the input of every block, in bytes."""
    return way.width * skeleton.hidden * max(skeleton.layers - adapted.first_block, 1)
