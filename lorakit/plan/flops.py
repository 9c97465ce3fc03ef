"""How much a training run computes, whatever the device: what its time depends on, and its FLOPs."""

import math
from dataclasses import dataclass

from lorakit.model.spec import ModelSpec, WeightSpec
from lorakit.plan.fit import SizedRun
from lorakit.plan.memory import CHUNK_LOGITS, DTYPE_BYTES, weight_bytes
from lorakit.plan.trainable_params import TrainableParams
from lorakit.recipe.schema import Recipe

# The share of tokens that are trained, where no row is known.
TRAINED_SHARE = 0.5


@dataclass(frozen=True)
class DoraWorkload:
    """What DoRA adds to a LoRA: the norm of each row of W + s B A, and outputs that are scaled by it.

    In float32 lorakit takes the norm from W A^T (lorakit/model/fused_lora.py), once a micro-batch. Under autocast
    PEFT's own forward runs (peft/tuners/lora/dora.py), which builds B A of an identity, and the sum with W, in each
    forward pass.
    """

    modules: int
    """Adapted layers."""
    built: bool
    """Whether B A and the sum are built, PEFT's way."""
    norm: int
    """Multiplications of all norms, taken once."""
    weights: int
    """Numbers of the adapted weights."""
    identities: int
    """Numbers of the identities that PEFT sends through A and B: input width squared."""
    outputs: int
    """Numbers that come out of the adapted layers, a token."""
    twice: int = 0
    """Weights by which a token is multiplied twice: with dropout, of what went in and of what was left of it."""


@dataclass(frozen=True)
class Workload:
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
    checkpointing: bool
    optimizer_numbers: int
    """Numbers that the optimizer moves."""
    layers: int
    layers_back: int
    """Blocks that a gradient goes back through: from the first trained one on."""
    layers_adapted: int
    """Blocks that hold an adapter."""
    hidden: int
    """The width of the hidden states."""
    trained_body: int = 0
    """Weights of the body that are trained themselves: full fine-tuning."""
    trained_head: bool = False
    dora: DoraWorkload | None = None
    held_out_tokens: int = 0
    """That go forward through the body to score held-out rows, over all scorings of the run."""
    held_out_trained_tokens: int = 0

    @property
    def share_back(self) -> float:
        """The share of the blocks that a gradient goes back through: only these are computed again, too."""
        return self.layers_back / self.layers

    @property
    def forwards(self) -> int:
        """How often a block that a gradient goes back through is computed forward."""
        return 2 if self.checkpointing else 1

    @property
    def passes(self) -> float:
        """How often a micro-batch uses each frozen weight, on average."""
        return 1 + self.share_back * self.forwards


def training_flops(work: Workload) -> float:
    """FLOPs of the whole run: what the arithmetic needs, whatever the device.

    Two a weight and token forward, two for the gradient of the inputs, two for that of trained weights, two more where
    checkpointing computes the block again. Attention is causal: half of length squared.
    """
    again, back = work.forwards - 1, work.share_back
    twice = work.dora.twice if work.dora else 0
    body = work.body * (2 + (2 + 2 * again) * back) + 2 * work.trained_body
    body += work.adapter * (6 + 2 * again) + twice * (4 + 2 * again)
    attention = work.attention * (2 + (4 + 2 * again) * back)
    logits = work.trained_tokens / max(work.micro_batches, 1) * work.head / work.hidden
    head = work.head * (4 + (2 if logits > CHUNK_LOGITS else 0) + (2 if work.trained_head else 0))
    training = work.tokens * body + work.square_tokens * attention + work.trained_tokens * head
    held_out = work.held_out_tokens * (work.body + work.adapter) + work.held_out_trained_tokens * work.head
    return float(training + 2 * held_out)


def run_workload(
    load: SizedRun,
    micro: int,
    checkpointing: bool,
    *,
    length: float,
    trained: float = TRAINED_SHARE,
    steps: int = 1,
    padding: float = 0.0,
    held_out: int = 0,
) -> Workload:
    """A run of so many steps in the numbers that its time hangs on.

    Args:
        micro: rows of a micro-batch.
        length: tokens of a row on average.
        trained: the share of tokens that the loss is computed at; padding: of computed tokens that are none of a row.
        held_out: tokens that are scored over the whole run.
    """
    recipe, spec, adapted = load.recipe, load.spec, load.trainable
    examples = steps * recipe.train.batch_size
    numbers = sum(weight.size for weight in spec.quantizable) if load.quantization != "none" else 0
    width = 4 if adapted.full_fine_tuning else DTYPE_BYTES[recipe.model.dtype]
    query = max((weight.inner for weight in spec.weights if weight.sublayer == "attention"), default=spec.hidden)
    trained_body = 0
    if adapted.full_fine_tuning:
        in_blocks = sum(weight.size for block in spec.blocks.values() for weight in block)
        trained_body = round(spec.active_numbers * min(1.0, adapted.whole / in_blocks))
    return Workload(
        steps=steps,
        micro_batches=steps * math.ceil(recipe.train.batch_size / micro),
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
        dora=_dora(spec, adapted, recipe) if adapted.dora else None,
        held_out_tokens=held_out,
        held_out_trained_tokens=round(held_out * trained),
    )


def _dora(spec: ModelSpec, adapted: TrainableParams, recipe: Recipe) -> DoraWorkload:
    built = recipe.model.dtype != "float32"
    chosen = [weight for weight in spec.weights if weight.path in adapted.ranks]
    # PEFT multiplies an identity with A and then with B: in x rank x (in + out); the factored norm W with A's rows.
    norms = (
        adapted.ranks[weight.path] * weight.inner * (weight.outer + (weight.inner if built else 0)) for weight in chosen
    )
    size = sum(weight.outer * weight.inner for weight in chosen)
    return DoraWorkload(
        modules=len(chosen),
        built=built,
        norm=sum(norms),
        weights=size,
        identities=sum(weight.inner**2 for weight in chosen) if built else 0,
        outputs=sum(weight.outer for weight in chosen),
        twice=size if recipe.adapter.dropout else 0,
    )
