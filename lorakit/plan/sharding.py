"""What each of several devices holds and sends: by `train.sharding`, from sizes alone.

Devices share out the rows of a step. What is not shared out besides is whole on each of them, and computed alike.
docs/planning.md (Several devices) says what of each strategy was compared with a run.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorakit.hardware.devices import Devices
from lorakit.hardware.links import Link
from lorakit.model.spec import ModelSpec
from lorakit.plan.trainable_params import TrainableParams

if TYPE_CHECKING:
    from lorakit.plan.activations import TrainingStep
    from lorakit.plan.memory import Memory

SHARED: dict[tuple[str, bool], tuple[str, ...]] = {
    ("none", False): (),
    ("none", True): (),
    ("fsdp", False): ("weights",),
    ("fsdp", True): ("weights", "gradients", "optimizer"),
    ("zero-2", False): ("gradients", "optimizer"),
    ("zero-2", True): ("gradients", "optimizer"),
    ("zero-3", False): ("weights", "gradients", "optimizer"),
    ("zero-3", True): ("weights", "gradients", "optimizer"),
}
"""Strategy, and whether the weights themselves are trained -> the components of which a device holds its part."""

# Blocks whose weights FSDP has whole on a device at once: the one that computes, and the next one's in flight (torch's
# distributed/fsdp/_fully_shard/_fsdp_param_group.py).
_BLOCKS_AT_ONCE = 2
# Numbers that DeepSpeed keeps gathered where they are used again within as many (stage3_max_live_parameters and
# stage3_max_reuse_distance, their defaults); packed ones of quantized weights count as one each.
_LIVE = 1_000_000_000
# lorakit/distributed/processes.py and train/zero.py: numbers of gradients that are summed in one message, which are
# copied for it; DeepSpeed reserves the memory.
BUCKET = 1 << 24
# What NCCL takes on a card besides: 688 MB on A100 with NVLink (nccl#964); over PCIe it has two channels, of which each
# takes 12 MB for a neighbour (nccl-tests#117).
_COLLECTIVES_NVLINK, _COLLECTIVES = 688_000_000, 100_000_000


def shares_base(step: "TrainingStep") -> bool:
    """Whether each device holds a part of the base's weights and gathers the rest when it computes."""
    return step.devices > 1 and "weights" in SHARED[step.sharding, False]


def collectives_bytes(devices: Devices) -> int:
    """The bytes that NCCL takes on each of several cards; 0 for one."""
    if devices.link is None:
        return 0
    return _COLLECTIVES_NVLINK if devices.link.name.startswith("nvlink") else _COLLECTIVES


@dataclass(frozen=True)
class WeightParts:
    """The base's weights as they are held, in bytes: `states` are the scales of quantized numbers, `root` is what lies
    outside the blocks (embeddings, head, last norm), `block` the largest block without its scales."""

    total: int
    states: int
    root: int
    block: int


def weight_parts(spec: ModelSpec, quantization: str, total: int, width: int) -> WeightParts:
    """The parts of weights that take `total` bytes in a quantization, and `width` a number where they have none."""
    bytes_each = {"none": width, "q8": 1}.get(quantization, 0.5)
    linear = {number: sum(one.size for one in block if not one.fused) for number, block in spec.blocks.items()}
    sizes = [linear[at] * bytes_each + (numbers - linear[at]) * width for at, numbers in spec.block_numbers.items()]
    root = (spec.parameters - sum(spec.block_numbers.values())) * width
    return WeightParts(total, max(0, round(total - root - sum(sizes))), root, round(max(sizes, default=0)))


def memory_of_one(memory: "Memory", adapted: TrainableParams, step: "TrainingStep", parts: WeightParts) -> "Memory":
    """A moment of a training as one of its devices holds it: its part of what is shared out, and what is made whole of
    the others' parts for the time of a product."""
    shared = SHARED[step.sharding, adapted.full_fine_tuning]
    divided = {name: math.ceil(getattr(memory, name) / step.devices) for name in shared if name != "weights"}
    memory = replace(memory, **divided, overhead=memory.overhead + step.collectives)
    if memory.moment == "loading":  # every process reads the whole
        return memory
    if "weights" in shared:
        weights = math.ceil((parts.total - parts.states) / step.devices) + parts.states
        memory = replace(memory, weights=weights, gathered=_gathered(step, parts))
        if adapted.full_fine_tuning and step.autocast and step.checkpointing:
            # Casts of weights are not kept for another use (lorakit/train/micro_batching.py), but autograd keeps them.
            casts = (parts.root + parts.block) // 2
            memory = replace(memory, buffers=memory.buffers - 2 * adapted.trained + casts)
    copied = min(adapted.trained, BUCKET) * step.trained_width
    if step.sharding.startswith("zero"):  # the weights that DeepSpeed steps are a copy of each device's part
        component = "weights" if adapted.full_fine_tuning else "adapter"
        copy = math.ceil(adapted.trained * step.trained_width / step.devices)
        return replace(memory, **{component: getattr(memory, component) + copy}, buffers=memory.buffers + copied)
    if step.sharding == "fsdp" and adapted.full_fine_tuning:
        # Gradients are whole until each device has the sum of its part, and once more as they are sent: of the blocks
        # soon, of what lies outside them when the pass ends.
        whole = {"backward": parts.root + _BLOCKS_AT_ONCE * parts.block, "end of the backward pass": 2 * parts.root}
        return replace(memory, gradients=memory.gradients + whole.get(memory.moment, 0))
    return replace(memory, buffers=memory.buffers + (copied if memory.moment == "end of the backward pass" else 0))


def _gathered(step: "TrainingStep", parts: WeightParts) -> int:
    """The bytes of weights that are whole on a device at once: what lies outside the blocks, and some blocks."""
    blocks = _BLOCKS_AT_ONCE * parts.block
    if step.sharding == "zero-3":
        live = _LIVE * (1 if parts.states else step.width)
        blocks = min(parts.total - parts.states - parts.root, max(blocks, live))
    return parts.root + blocks


@dataclass(frozen=True)
class Transfer:
    """What a device sends for one purpose in a step, while it receives as much."""

    what: str
    collective: str
    bytes: int
    overlaps: bool  # whether it is sent while the device computes; else the device waits for it


def transfers(
    parts: WeightParts, layers: int, adapted: TrainableParams, step: "TrainingStep", micro_batches: float
) -> tuple[Transfer, ...]:
    """What each device sends in a step of so many micro-batches. In a ring an all-reduce sends 2 (N - 1)/N of the
    tensor, an all-gather and a reduce-scatter (N - 1)/N of the whole."""
    if step.devices == 1:
        return ()
    share, shared = (step.devices - 1) / step.devices, SHARED[step.sharding, adapted.full_fine_tuning]
    trained = adapted.trained * step.trained_width
    sent: list[Transfer] = []
    if "weights" in shared:
        # Each micro-batch makes the weights whole for its forward and again for its backward, which goes no further
        # than the first trained block; what lies outside the blocks stays whole from the one to the other.
        blocks, back = parts.total - parts.states - parts.root, 1 - adapted.first_block / layers
        gathered = micro_batches * share * (parts.root + blocks * (1 + back))
        sent.append(Transfer("weights, forward and backward", "all-gather", round(gathered), True))
        if adapted.full_fine_tuning:
            reduced = micro_batches * share * trained
            sent.append(Transfer("gradients", "reduce-scatter", round(reduced), True))
            return tuple(sent)
    if "gradients" in shared:
        # DeepSpeed sums after each micro-batch.
        sent.append(Transfer("gradients", "reduce-scatter", round(micro_batches * share * trained), False))
        sent.append(Transfer("trained weights", "all-gather", round(share * trained), False))
    else:
        sent.append(Transfer("gradients", "all-reduce", round(2 * share * trained), False))
    return tuple(sent)


def step_seconds(computing: float, sent: tuple[Transfer, ...], link: Link) -> float:
    """How long a step takes that computes for so long: what overlaps is sent meanwhile, as far as that reaches."""
    beside, after = (sum(one.bytes for one in sent if one.overlaps is so) / link.bandwidth for so in (True, False))
    return max(computing, beside) + after
