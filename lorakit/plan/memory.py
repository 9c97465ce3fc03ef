"""The memory model: what a training holds on its device at its fullest moment, by component, from sizes alone.

Each component is counted from what the code really holds: weights in their number format or quantization, the adapter
with its gradients and optimizer states, what autograd keeps (activations.py), the logits of the output head, and
buffers. Several moments of a step are looked at, since not everything is there at once.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from lorakit.hardware.devices import ONE_DEVICE, Devices
from lorakit.hardware.machine import Machine
from lorakit.model.kernel_families import kernel_family
from lorakit.model.logit_chunks import chunk_logits
from lorakit.model.quantization_config import CheckpointQuantization, describe_savings, missing_packages
from lorakit.model.spec import ModelSpec
from lorakit.plan.activations import TrainingStep, norm_bytes, saved_activations
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.sharding import (
    Transfer,
    WeightParts,
    collectives_bytes,
    memory_of_one,
    shares_base,
    transfers,
    weight_parts,
)
from lorakit.plan.trainable_params import TrainableParams, count_trainable
from lorakit.recipe.adapter_kind import adapter_spec
from lorakit.recipe.attention import ATTENTIONS
from lorakit.recipe.schema import Model, Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Numbers of W + B A that DoRA's norm builds at once (lorakit/model/dora.py).
DORA_ROWS = 1 << 22
# bitsandbytes keeps a float32 for every 256 numbers of each of AdamW's two states in 8 bits.
_STATE_8_BIT = 1 + 4 / 256
# A CUDA context with cuBLAS' workspace; cards differ between 0.3 and 1.3 GB.
CONTEXT = 600 << 20
# Python with torch, transformers, peft, trl and datasets imported, in bytes of resident memory (measured).
PROCESS = 620_000_000
# glibc seldom fits an aligned block into the hole that another one left: what autograd keeps takes this much more
# (measured on SmolLM2 with glibc 2.36: 1.25 to 1.30 over lengths, rows and quantizations). With checkpointing blocks of
# a MB and more are given back at once (lorakit/train/micro_batching.py), since nearly all would be holes.
_HOLES = 1.27
# Tokens of the two rows on which a run tries its loss before the first step (lorakit/train/preflight.py).
_TRIED_TOKENS = 256
# Tensors that may be on their way to main memory at once (lorakit/train/offloading.py).
_ON_THEIR_WAY = 5
# lorakit/model/generation.py: rows and tokens that are answered together, by device.
_EVAL_ROWS, _EVAL_ROWS_ON_CPU, _EVAL_SHARE, _EVAL_MIN_TOKENS = 256, 64, 0.25, 1 << 11
# lorakit/merge/proof.py: the positions whose logits are kept of both models, in float32.
_MERGE_LOGITS, _MERGE_POSITIONS = 1 << 25, 512
# The share of a device's memory that a run may be planned to take: the rest is the model's error, and what the
# allocator cannot give back in one piece. On a processor, of the memory that is free, and on a Mac, whose screen uses
# the GPU's memory too: the system and other programs.
_SHARE, _SHARE_BESIDE_OTHERS = 0.92, {"cpu": 0.85, "mps": 0.85}


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at one moment, by component."""

    moment: str = ""
    weights: int = 0
    gathered: int = 0  # weights of which several devices hold parts, made whole for the time of a product
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0
    overhead: int = 0  # the device's context, or on a processor the libraries themselves

    @property
    def components(self) -> dict[str, int]:
        """Component -> bytes, in the order in which they are shown."""
        return {name: size for name, size in vars(self).items() if name != "moment"}

    @property
    def total(self) -> int:
        return sum(self.components.values())

    def to_dict(self) -> dict[str, int]:
        """The components and their total, as a manifest has them."""
        return {**self.components, "total": self.total}

    @property
    def allocated(self) -> int:
        """Without the overhead: what torch.cuda.max_memory_allocated() counts."""
        return self.total - self.overhead


def weight_bytes(spec: ModelSpec, quantization: str, double_quant: bool, width: int) -> int:
    """The base's weights as they are held: quantized layers, and the rest at `width` bytes a number.

    8 bits have a float32 for each row; 4 bits one for 64 weights, itself one byte and a 256th of a float32 when it is
    quantized too (LLM.int8, arXiv 2208.07339; QLoRA, arXiv 2305.14314).
    """
    if quantization == "none":
        return spec.parameters * width
    numbers = sum(weight.size for weight in spec.quantizable)
    if quantization == "q8":
        total = numbers + 4.0 * sum(weight.outer for weight in spec.quantizable)
    else:
        total = numbers * (0.5 + ((1 + 4 / 256) if double_quant else 4) / 64)
    return round(total + (spec.parameters - numbers) * width)


def peak_memory(spec: ModelSpec, adapted: TrainableParams, training: TrainingStep) -> Memory:
    """The fullest moment of a training."""
    return max(memory_by_moment(spec, adapted, training), key=lambda memory: memory.total)


def memory_by_moment(spec: ModelSpec, adapted: TrainableParams, training: TrainingStep) -> list[Memory]:
    """The moments that may be the fullest (docs/planning.md, The memory model)."""
    always = _always(spec, adapted, training)
    saved, block, attention = _saved(spec, adapted, training)
    gradients, width = adapted.trained * training.trained_width, DTYPE_BYTES[training.dtype]
    # Of the largest weight what is made for one product and dropped again: dequantized, and for DoRA's norm some rows
    # of W + B A in float32, or as PEFT has it B A and the sum.
    largest = max((weight.size for weight in spec.quantizable), default=0)
    made = largest * (width if training.quantization != "none" else 0)
    if adapted.dora and (width < 4 or training.on_gpu):
        made += 8 * largest if training.written_out else 4 * min(largest, DORA_ROWS)
    buffers = always.buffers + made
    accumulated = gradients if training.accumulates or not adapted.full_fine_tuning else 0
    logits = _logits(spec, adapted, training)
    at_loss = replace(always, moment="loss", gradients=accumulated, activations=saved, logits=logits)
    begins = replace(at_loss, moment="backward", activations=saved + block, logits=0, buffers=buffers)
    ends = replace(always, moment="end of the backward pass", gradients=gradients, buffers=buffers)
    moments = [at_loss, begins, ends]
    if training.attention == "eager":
        moments.append(replace(begins, moment="backward of attention", activations=saved + attention))
    if not training.on_gpu:
        # While weights are read, the file's pages are resident too: as many as the model has numbers, in 16 bits.
        moments.append(replace(always, moment="loading", adapter=0, optimizer=0, buffers=2 * spec.parameters))
        # The loss is tried on two short rows, against the model's own logits.
        tried, _ = saved_activations(spec, adapted, training)
        saved = round(_HOLES * tried.of(2, _TRIED_TOKENS // 2))
        logits = _TRIED_TOKENS * spec.vocabulary * (2 * width + 8)
        moments.append(replace(always, moment="trying the loss", optimizer=0, activations=saved, logits=logits))
    if training.devices == 1:
        return moments
    parts = _weight_parts(spec, adapted, training)
    return [memory_of_one(moment, adapted, training, parts) for moment in moments]


def _weight_parts(spec: ModelSpec, adapted: TrainableParams, training: TrainingStep) -> WeightParts:
    width = _weight_width(adapted, training)
    total = weight_bytes(spec, training.quantization, training.double_quant, width)
    return weight_parts(spec, training.quantization, total, width)


def _weight_width(adapted: TrainableParams, training: TrainingStep) -> int:
    """Bytes of a number of the base that is not quantized."""
    return training.trained_width if adapted.full_fine_tuning else DTYPE_BYTES[training.dtype]


def _always(spec: ModelSpec, adapted: TrainableParams, training: TrainingStep) -> Memory:
    """What is there all the time."""
    width, trained_width = DTYPE_BYTES[training.dtype], training.trained_width
    # autocast keeps its casts of float32 weights
    rounded = 2 * (adapted.trained + adapted.beside) if width < 4 and trained_width == 4 else 0
    paged = training.optimizer.startswith("paged") and training.on_gpu
    states = 2 * (adapted.small if paged else adapted.trained)  # the others move to main memory where there is no room
    return Memory(
        weights=weight_bytes(spec, training.quantization, training.double_quant, _weight_width(adapted, training)),
        adapter=(adapted.matrices + adapted.beside + adapted.copied + adapted.token_rows) * trained_width,
        optimizer=round(states * (_STATE_8_BIT if training.optimizer.endswith("8bit") else trained_width)),
        buffers=rounded,
        overhead=CONTEXT if training.on_gpu else PROCESS,
    )


def _saved(spec: ModelSpec, adapted: TrainableParams, way: TrainingStep) -> tuple[int, int, int]:
    """Bytes that autograd keeps of the whole pass, and what the backward of a block adds: of all of it, and of its
    attention after its feed-forward half."""
    whole, largest = saved_activations(spec, adapted, way)
    if way.offloading:  # what is on its way, and then what is back before it is used
        whole = largest
    rows, length = way.rows, way.length
    tokens = rows * length
    # Gradients of three hidden states, and of gate and up in the feed-forward width.
    widest = 2 * max((weight.inner * spec.used(weight) for weight in spec.weights if not weight.is_head), default=0)
    flowing = tokens * way.width * (3 * spec.hidden + widest)
    block, attending = largest.of(rows, length), largest.attending(rows, length)
    attending += tokens * way.width * 2 * spec.hidden  # gradients of the block's output and of the hidden states
    if way.checkpointing:
        last = tokens * norm_bytes(spec, adapted, way)  # gone when the backward of a block begins
        saved = _block_inputs(spec, adapted, way, _ON_THEIR_WAY if way.offloading else None) + last
        return round(saved), round(block + flowing - last), round(attending - last)
    # A processor's holes have room for it; there are none where weights that are gathered are given back at once.
    holes, flowing = (1.0, flowing) if way.on_gpu or shares_base(way) else (_HOLES, 0)
    return round(holes * whole.of(rows, length)), round(flowing), round(attending - block)


def _block_inputs(spec: ModelSpec, adapted: TrainableParams, way: TrainingStep, most: int | None = None) -> float:
    """Of each block that is computed twice its input; of `most` blocks where the others' are not on the device."""
    blocks = max(spec.layers - adapted.first_block, 1)
    return way.rows * way.length * way.width * spec.hidden * float(blocks if most is None else min(most, blocks))


def _logits(spec: ModelSpec, adapted: TrainableParams, training: TrainingStep) -> int:
    """The head at its fullest: logits, their gradient in float32, and in half precision a copy in each type beside it;
    a soft cap keeps its tanh; where single rows of it are trained, the gradient without them. Of the hidden states the
    trained ones, and their gradient."""
    width = DTYPE_BYTES[training.dtype]
    positions = min(training.trained, max(1, chunk_logits(training.card) // spec.vocabulary))
    each = (12 if width < 4 else 8) + width * (spec.logits_capped + bool(adapted.token_rows))
    return 2 * training.trained * spec.hidden * width + positions * spec.vocabulary * each


def evaluation_memory(run: "SizedRun", longest: int, machine: Machine) -> int:
    """Peak bytes of an evaluation on rows of at most `longest` tokens: weights, keys and values of the rows that go
    together, and their logits."""
    spec, model, width = run.spec, run.recipe.model, DTYPE_BYTES[run.recipe.model.dtype]
    tokens = longest + run.recipe.evaluate.max_new_tokens
    weights = weight_bytes(spec, run.quantization, model.double_quant, width) + 4 * run.trainable.matrices
    overhead = CONTEXT if machine.is_gpu else PROCESS
    free = max(machine.memory - weights - overhead, 0)
    stored = 2 * spec.layers * spec.key_value * width
    most = _EVAL_ROWS if machine.is_gpu else _EVAL_ROWS_ON_CPU
    at_once = max(_EVAL_MIN_TOKENS, min(most * tokens, int(free * _EVAL_SHARE / stored)))
    rows = max(1, at_once // tokens)
    # Growing keys and values are copied layer by layer, and a prompt's activations are there for one block at a time.
    growing = stored * at_once * (1 + 1 / spec.layers)
    flowing = at_once * 8 * spec.hidden * width
    return round(weights + overhead + growing + flowing + rows * spec.vocabulary * 8)


def merge_memory(spec: ModelSpec) -> int:
    """Peak bytes of main memory of a merge with its proof: one tensor in float32 three times, or a block of both models
    and the logits that are compared."""
    largest = max((weight.size for weight in spec.weights if not weight.is_head), default=0)
    block = max((sum(weight.size for weight in block) for block in spec.blocks.values()), default=0)
    logits = max(_MERGE_LOGITS, _MERGE_POSITIONS * spec.vocabulary)
    return PROCESS + max(12 * largest, 8 * (block + logits))


def effective_quantization(settings: Model, kind_quantizes: str | None, info: ModelInfo | None) -> tuple[str, str]:
    """The quantization in which the base is really held, and why where the recipe's word does not say it."""
    stored = info.stored if info else None
    if stored and stored.treatment == "kept":
        return stored.quantization, "the checkpoint is quantized already"
    if kind_quantizes:
        return kind_quantizes, "the kind of adapter quantizes"
    if stored:
        return settings.quantization, f"the checkpoint is {stored.quantization}, and is dequantized while it is loaded"
    return settings.quantization, ""


def describe_checkpoint(stored: CheckpointQuantization, machine: Machine) -> str:
    """What follows from the quantization that the weights have on disk, in a sentence."""
    counted = "trained on and counted as stored, so that its own weights cannot be trained"
    if stored.treatment == "dequantized":
        counted = "dequantized while it is loaded, and counted so"
    text = f"{stored.quantization} on disk, {counted}"
    if machine.here and (missing := missing_packages(stored)):
        text += f"; training is refused here until {' and '.join(missing)} can load it: pip install {' '.join(missing)}"
    elif stored.packages:
        text += f"; the machine needs {' and '.join(stored.packages)} to load it"
    return text


def quantization_line(settings: Model, kind_quantizes: str | None, info: ModelInfo | None) -> str:
    """The sentence of `lorakit check`: the quantization asked for, the one in effect, the share and the bytes saved.
    `settings` have their dtype resolved; `kind_quantizes`: how the adapter's kind itself quantizes the base."""
    effective, reason = effective_quantization(settings, kind_quantizes, info)
    if effective == "none":
        return f"none: {reason or 'the weights as they are'}"
    refused = f"{settings.quantization} was asked for, {effective} is used: {reason}. "
    begin, spec = refused if effective != settings.quantization else "", info.spec if info else None
    if info is None or spec is None or info.stored or effective not in ("q8", "q4", "nf4"):
        when = "here" if info is None else "loaded"
        return f"{begin}{effective}: the share and the bytes saved are known when the model is {when}"
    width = DTYPE_BYTES[settings.dtype]
    share = sum(weight.size for weight in spec.quantizable) / spec.parameters
    before, after = (weight_bytes(spec, word, settings.double_quant, width) for word in ("none", effective))
    return begin + describe_savings(effective, share, before, after)


@dataclass(frozen=True)
class SizedRun:
    """A recipe on a model: all that memory depends on but the rows and tokens of a micro-batch."""

    recipe: Recipe  # with dtype, attention, packing and optimizer resolved
    spec: ModelSpec
    trainable: TrainableParams
    quantization: str  # the quantization in which the base is really held
    on_gpu: bool
    devices: Devices = ONE_DEVICE
    card: int = 0  # bytes of memory of a GPU
    kernels: tuple[str, ...] = ()  # the names of those that take the place of the model's own code

    @property
    def rows(self) -> int:
        """The most rows that one device has of a step."""
        return math.ceil(self.recipe.train.batch_size / self.devices.count)

    def step(self, rows: int, length: int, checkpointing: bool) -> TrainingStep:
        """A step with micro-batches of so many rows, each of so many tokens."""
        recipe = self.recipe
        return TrainingStep(
            rows=rows,
            length=length,
            trained=rows * length,
            dtype=recipe.model.dtype,
            quantization=self.quantization,
            double_quant=recipe.model.double_quant,
            attention=recipe.model.attention,
            checkpointing=checkpointing,
            offloading=recipe.train.offload_activations,
            masked=recipe.data.packing == "on" and ATTENTIONS[recipe.model.attention].dense_mask,
            dropout=recipe.adapter.dropout,
            optimizer=recipe.train.optimizer,
            accumulates=rows < self.rows,
            kernels=self.kernels,
            on_gpu=self.on_gpu,
            card=self.card,
            devices=self.devices.count,
            sharding="none" if recipe.train.sharding == "auto" else recipe.train.sharding,
            collectives=collectives_bytes(self.devices) if self.on_gpu else 0,
        )

    def memory(self, rows: int, length: int, checkpointing: bool) -> Memory:
        return peak_memory(self.spec, self.trainable, self.step(rows, length, checkpointing))

    def offloaded(self, rows: float, length: float, checkpointing: bool) -> int:
        """The bytes of so many rows of so many tokens that wait in main memory between the passes; 0 where they are
        kept on the device."""
        if not self.recipe.train.offload_activations:
            return 0
        step, tokens = self.step(1, 1, checkpointing), rows * length
        if checkpointing:
            return round(tokens * _block_inputs(self.spec, self.trainable, step))
        whole, _ = saved_activations(self.spec, self.trainable, step)
        return round(tokens * (whole.per_token + whole.per_pair * length) + whole.fixed)

    def transfers(
        self, micro: int, length: int, checkpointing: bool, micro_batches: float | None = None
    ) -> tuple[Transfer, ...]:
        """What a device sends in a step, in micro-batches of at most so many rows of the longest; `micro_batches`: how
        many there are, where rows are shorter."""
        step = self.step(micro, length, checkpointing)
        parts = _weight_parts(self.spec, self.trainable, step)
        count = math.ceil(self.rows / micro) if micro_batches is None else micro_batches
        return transfers(parts, self.spec.layers, self.trainable, step, count)

    def largest_micro_batch(self, length: int, checkpointing: bool, most: int, budget: int) -> int:
        """The most rows, up to `most`, that fit into so many bytes; 0 where not even one row does."""
        return bisect_right(range(1, most + 1), budget, key=lambda rows: self.memory(rows, length, checkpointing).total)


def size_run(
    recipe: Recipe, info: ModelInfo, spec: ModelSpec, on_gpu: bool, devices: Devices = ONE_DEVICE, card: int = 0
) -> SizedRun:
    """A recipe on a model, on a GPU with `card` bytes of memory or on a processor, one or several; a `UserError` where
    its adapter chooses what the model does not have."""
    quantization, _ = effective_quantization(recipe.model, adapter_spec(recipe.adapter).quantizes, info)
    if quantization in ("gptq", "awq"):  # 4 or 8 bits with scales, in either form
        quantization = "q8" if info.stored and info.stored.bits == 8 else "nf4"
    family = kernel_family(info.model_type) if recipe.train.kernels != "off" else None
    kernels = family.kernels(on_gpu) if family and (on_gpu or recipe.model.dtype == "float32") else ()
    trainable = count_trainable(spec, recipe.adapter, len(recipe.model.add_tokens))
    return SizedRun(recipe, spec, trainable, quantization, on_gpu, devices, card, kernels)


def memory_budget(machine: Machine) -> int:
    """The bytes of a machine's memory that a run may be planned to take."""
    return int(machine.memory * _SHARE_BESIDE_OTHERS.get(machine.device, _SHARE))
