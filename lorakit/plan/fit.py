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
    """A recipe on a model: all that memory depends on but the rows and tokens of a micro-batch."""

    recipe: Recipe
    """With dtype, attention, packing and optimizer resolved."""
    spec: ModelSpec
    trainable: TrainableParams
    quantization: str
    """The quantization in which the base is really held."""
    on_gpu: bool

    def step(self, rows: int, length: int, checkpointing: bool) -> TrainingStep:
        """A step with micro-batches of so many rows, each of so many tokens."""
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
        """The peak with such micro-batches."""
        return peak_memory(self.spec, self.trainable, self.step(rows, length, checkpointing))

    def largest_micro_batch(self, length: int, checkpointing: bool, most: int, budget: int) -> int:
        """The most rows, up to `most`, that fit into so many bytes; 0 where not even one row does."""
        fitting, beyond = 0, most + 1
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            if self.memory(middle, length, checkpointing).total <= budget:
                fitting = middle
            else:
                beyond = middle
        return fitting


def size_run(recipe: Recipe, info: ModelInfo, spec: ModelSpec, on_gpu: bool) -> SizedRun:
    """A recipe on a model, on a GPU or a processor.

    Raises:
        UserError: its adapter chooses what the model does not have.
    """
    quantization, _ = effective_quantization(recipe.model, adapter_spec(recipe.adapter).quantizes, info)
    if quantization in ("gptq", "awq"):  # 4 or 8 bits with scales, in either form
        quantization = "q8" if info.stored and info.stored.bits == 8 else "nf4"
    return SizedRun(recipe, spec, count_trainable(spec, recipe.adapter), quantization, on_gpu)


def memory_budget(machine: Machine) -> int:
    """The bytes of a machine's memory that a run may be planned to take."""
    return int(machine.memory * _SHARE[machine.device])
