"""Whether a recipe fits a machine, by the memory model: the same answer for `auto`, `lorakit plan` and its remedies."""

from dataclasses import dataclass

from lorakit.hardware.machine import Machine
from lorakit.model.spec import ModelSpec
from lorakit.plan.checkpoint import effective_quantization
from lorakit.plan.memory import Memory, TrainingStep, peak_memory
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.trainable_params import TrainableParams, count_trainable
from lorakit.recipe.adapter_kind import adapter_spec
from lorakit.recipe.schema import Recipe

# The share of a device's memory that a run may be planned to take: the rest is the model's error, and what the
# allocator cannot give back in one piece. On a processor, of the memory that is free: the system and other programs.
_SHARE = {"cuda": 0.92, "cpu": 0.85}


@dataclass(frozen=True)
class SizedRun:
    """A recipe on a model, as far as memory depends on it: everything but how many rows and tokens are held at once."""

    recipe: Recipe
    """With dtype, attention, packing and optimizer settled."""
    spec: ModelSpec
    trainable: TrainableParams
    quantization: str
    """The quantization in which the base is really held."""
    on_gpu: bool

    def training(self, rows: int, length: int, checkpointing: bool) -> TrainingStep:
        """One micro-batch of so many rows, each of so many tokens."""
        recipe = self.recipe
        packed, flash = recipe.data.packing == "on", recipe.model.attention == "flash_attention_2"
        return TrainingStep(
            rows=rows,
            length=length,
            trained=rows * length,
            dtype=recipe.model.dtype,
            quantization=self.quantization,
            double_quant=recipe.model.double_quant,
            attention=recipe.model.attention,
            checkpointing=checkpointing,
            masked=not (packed and flash) and (packed or rows > 1),
            dropout=recipe.adapter.dropout,
            optimizer=recipe.train.optimizer,
            accumulates=rows < recipe.train.batch_size,
            on_gpu=self.on_gpu,
        )

    def memory(self, rows: int, length: int, checkpointing: bool) -> Memory:
        """The fullest moment with such a micro-batch."""
        return peak_memory(self.spec, self.trainable, self.training(rows, length, checkpointing))


def size_run(recipe: Recipe, facts: ModelInfo, spec: ModelSpec, on_gpu: bool) -> SizedRun:
    """What a recipe puts on a device.

    Raises:
        UserError: its adapter chooses what the model does not have.
    """
    own = adapter_spec(recipe.adapter).quantizes
    quantization, _ = effective_quantization(recipe.model, own, facts)
    held = quantization
    if quantization in ("gptq", "awq"):  # 4 or 8 bits with scales, in either form
        held = "q8" if facts.stored and facts.stored.bits == 8 else "nf4"
    return SizedRun(recipe, spec, count_trainable(spec, recipe.adapter), held, on_gpu)


def memory_budget(machine: Machine) -> int:
    """The bytes of a machine's memory that a run may be planned to take."""
    return int(machine.memory * _SHARE[machine.device])


def largest_micro_batch(load: SizedRun, length: int, checkpointing: bool, most: int, memory: int) -> int:
    """The largest micro-batch up to `most` that fits into so many bytes; 0 where not even one row does."""
    fitting, beyond = 0, most + 1
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        if load.memory(middle, length, checkpointing).total <= memory:
            fitting = middle
        else:
            beyond = middle
    return fitting
