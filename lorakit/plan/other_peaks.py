"""What the commands around a training hold at their fullest moment: an evaluation, and a merge in main memory."""

from lorakit.hardware.machine import Machine
from lorakit.model.spec import ModelSpec
from lorakit.plan.memory import CONTEXT, PROCESS

# lorakit/evaluate/batching.py and generate.py: rows and tokens that are answered together, by device.
_ROWS, _SHARE, _LEAST_TOKENS = {"cpu": 64, "cuda": 256}, 0.25, 1 << 11
# lorakit/merge/proof.py: the positions whose logits are kept of both models, in float32.
_KEPT_LOGITS, _KEPT_POSITIONS = 1 << 25, 512


def evaluating(spec: ModelSpec, weights: int, width: int, tokens: int, machine: Machine) -> int:
    """Bytes of an evaluation: weights, keys and values of the rows that go together, and their logits.

    Args:
        weights: bytes of base and adapter. width: bytes of a number. tokens: of a row and its answer.
    """
    overhead = CONTEXT if machine.is_gpu else PROCESS
    free = max(machine.memory - weights - overhead, 0)
    stored = 2 * spec.layers * spec.key_value * width
    at_once = max(_LEAST_TOKENS, min(_ROWS[machine.device] * tokens, int(free * _SHARE / stored)))
    rows = max(1, at_once // tokens)
    # Growing keys and values are copied layer by layer, and a prompt's activations are there for one block at a time.
    growing = stored * at_once * (1 + 1 / spec.layers)
    flowing = at_once * 8 * spec.hidden * width
    return round(weights + overhead + growing + flowing + rows * spec.vocabulary * 8)


def merging(spec: ModelSpec) -> int:
    """Bytes of main memory of a merge with its proof: one tensor in float32 three times, or a block of both models and
    the logits that are compared."""
    blocks = [sum(weight.size for weight in block) for block in spec.blocks.values()]
    largest = max((weight.size for weight in spec.weights if not weight.is_head), default=0)
    logits = max(_KEPT_LOGITS, _KEPT_POSITIONS * spec.vocabulary)
    return PROCESS + max(12 * largest, 8 * max(blocks, default=0) + 8 * logits)
