"""What a checkpoint that is quantized on disk means for a run: how it is counted, what loads it, what it forbids."""

from dataclasses import dataclass

from lorakit.hardware.machine import Machine
from lorakit.model.quantization_config import CheckpointQuantization, missing_packages
from lorakit.plan.model_info import ModelInfo


@dataclass(frozen=True)
class Checkpoint:
    """The quantization that the weights have on disk, and what follows from it."""

    quantization: str
    treatment: str
    """kept: trained on as they lie there; dequantized: turned into plain weights while they are loaded."""
    mergeable: bool
    """Whether an adapter can be added to them."""
    lacking: tuple[str, ...]
    """Packages that load them and that this machine does not have."""
    said: str


def checkpoint_of(facts: ModelInfo, machine: Machine) -> Checkpoint | None:
    """What is to be told of a model's checkpoint; None where its weights are plain ones."""
    stored = facts.stored
    if stored is None:
        return None
    lacking = missing_packages(stored)
    said = f"{stored.quantization} on disk, {_counted(stored)}"
    if lacking and machine.here:
        said += f"; training is refused here until {' and '.join(lacking)} can load it: pip install {' '.join(lacking)}"
    elif stored.packages:
        said += f"; the machine needs {' and '.join(stored.packages)} to load it"
    return Checkpoint(stored.quantization, stored.treatment, stored.reversible, lacking, said)


def _counted(stored: CheckpointQuantization) -> str:
    if stored.treatment == "dequantized":
        return "dequantized while it is loaded, and counted so"
    return "trained on and counted as it lies there, so that its own weights cannot be trained"
