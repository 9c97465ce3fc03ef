"""What the tools that published peaks of memory do differently from lorakit, as far as memory hangs on it.

Each fact is from a tool's code or paper, which is named; every number counts bytes, and none is fitted to a figure.
Most were looked for after the model had missed the tool's rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.model.spec import ModelSpec, part
from lorakit.plan.activations import TrainingStep
from lorakit.plan.memory import DTYPE_BYTES, Memory, weight_bytes
from lorakit.plan.trainable_params import TrainableParams

# LitGPT computes the output head in pieces of so many positions (lm_head_chunk_size in finetune/lora.py).
_HEAD_CHUNK = 128


@dataclass(frozen=True)
class Tool:
    """One tool, or one of its versions."""

    training: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingStep."""
    way: dict[str, Any] | None = None
    """Fields of TrainingStep for the way through the blocks; None: it computes as lorakit does."""
    head: Callable[[ModelSpec, TrainingStep], tuple[float, float]] | None = None
    """Bytes of the logits at the loss, and of what stays of them in the backward pass; None: in lorakit's chunks."""
    block: Callable[[ModelSpec, TrainableParams, TrainingStep], float] | None = None
    """What one block keeps of a token beside what lorakit's would."""
    four_bit_inputs: bool = False
    """Whether its bitsandbytes keeps the input of every 4-bit layer: MatMul4Bit kept (A, B) until 0.43.2."""
    inputs_twice: bool = False
    """Whether those of the micro-batch before are there too."""
    fused_activation: bool = False
    """Whether it computes an activation in one operation that transformers writes out in several."""
    head_of_its_own: bool = False
    """Whether it ties no weights, and quantizes the output head as every linear layer."""


def _all_logits(spec: ModelSpec, training: TrainingStep) -> tuple[float, float]:
    """transformers' ForCausalLMLoss: the logits, and in float32 the output of log_softmax, its gradient (nll_loss makes
    it dense) and that of the input."""
    return (DTYPE_BYTES[training.dtype] + 12) * training.trained * spec.vocabulary, 0


def _all_logits_held(spec: ModelSpec, training: TrainingStep) -> tuple[float, float]:
    """The same, with the model's output in a variable through the backward pass."""
    at_loss, _ = _all_logits(spec, training)
    return at_loss, DTYPE_BYTES[training.dtype] * training.trained * spec.vocabulary


def _no_logits(spec: ModelSpec, training: TrainingStep) -> tuple[float, float]:
    """Cut cross-entropy (arXiv 2411.09009) never holds them."""
    return 0, 0


def _fabric_chunks(spec: ModelSpec, training: TrainingStep) -> tuple[float, float]:
    """LitGPT: Fabric makes the logits float32 (convert_output), their log_softmax stays beside them, and the gradients
    are of one piece. A head in 4 bits is dequantized to float16 and then bfloat16 in its backward."""
    logits = training.trained * spec.vocabulary
    capped = 2 * spec.logits_capped * logits
    at_loss = 8 * logits + 8 * _HEAD_CHUNK * training.rows * spec.vocabulary
    if training.quantization != "none":
        at_loss = max(at_loss, 6 * logits + 4 * spec.vocabulary * spec.hidden)
    return at_loss + capped, 0


def _litgpt_block(spec: ModelSpec, adapted: TrainableParams, way: TrainingStep) -> float:
    """LitGPT's attention and feed-forward layer (model.py, lora.py)."""
    block = next(iter(spec.blocks.values()))
    opening = [weight for weight in block if weight.sublayer == "attention" and part(weight) == "opens"]
    query = next(w.inner for w in block if w.sublayer == "attention" and part(w) == "closes")
    if way.attention == "eager" or len(opening) == 1:  # lorakit's expands them too; transformers' Phi-3 packs them too
        token = 0.0
    elif spec.key_value < query:  # keys and values are expanded, so that nothing holds the packed product
        token = 2.0 * way.width * (query - spec.key_value)
    else:  # queries, keys and values are one layer's product, of which the values are a view
        token = way.width * (query + spec.key_value)
    chosen = [weight for weight in opening if weight.path in adapted.ranks]
    token -= sum(weight.inner * (way.width + 1) for weight in chosen[1:])  # one dropout for all of them
    if chosen and len(chosen) < len(opening):  # LoRAQKVLinear.zero_pad: index_copy keeps its source
        token += way.width * (query + spec.key_value)
    packed = any(w.path.endswith("gate_up_proj") and w.path in adapted.ranks for w in block)
    return token + packed * spec.hidden * (way.width + 1)  # gate and up are two layers, each with its dropout


def _expanded_keys(spec: ModelSpec, adapted: TrainableParams, way: TrainingStep) -> float:
    """Keys and values are expanded for every head before the kernel (fitcheck's _install_gqa_sdpa_shim)."""
    block = next(iter(spec.blocks.values()))
    query = next(w.inner for w in block if w.sublayer == "attention" and part(w) == "closes")
    return 0.0 if way.attention == "eager" else 2.0 * way.width * (query - spec.key_value)


# LitGPT: bf16-true, so adapter, gradients and AdamW are in bfloat16; a default dropout of 0.05 (finetune/lora.py); no
# mask; torch.nn.functional.gelu; several micro-batches a step; the bitsandbytes of their time.
_LITGPT = Tool(
    training={"trained_width": 2, "accumulates": True, "masked": False},
    way={"plain_half": True, "written_out": True, "dropout": 0.05},
    head=_fabric_chunks,
    block=_litgpt_block,
    four_bit_inputs=True,
    fused_activation=True,
    head_of_its_own=True,
)

# How a row's source begins -> its tool.
TOOLS = {
    # At commit 8641822 (the table's own), which runs the longest rows first.
    "litgpt resource-tables": _LITGPT,
    # At commit 03ffc55: `loss` is still held when the next forward pass runs, and with it the tensors that bitsandbytes
    # stored beside autograd's (ctx.tensors, until its PR 1270), which the backward pass does not free.
    "litgpt config_hub": replace(_LITGPT, inputs_twice=True),
    # method_comparison/MetaMathQA (default_training_params.json, run.py): bfloat16 without autocast, the adapter in
    # float32 (autocast_adapter_dtype), so that each adapted layer copies its input; full fine-tuning in bfloat16.
    "peft": Tool(way={"plain_half": True, "written_out": True, "copies": True}, head=_all_logits),
    # fitcheck 0.3.1, scripts/measure.py: float16 without autocast, the adapter in float32, no padding.
    "fitcheck float16": Tool(
        training={"dtype": "float16", "masked": False},
        way={"plain_half": True, "written_out": True, "copies": True},
        head=_all_logits_held,
        block=_expanded_keys,
    ),
    # The same after PEFT's prepare_model_for_kbit_training, which makes norms, embeddings and head float32, and so the
    # hidden states.
    "fitcheck nf4": Tool(
        training={"dtype": "float32", "masked": False},
        way={"plain_half": True, "written_out": True},
        head=_all_logits_held,
        block=_expanded_keys,
    ),
    # examples/*.yaml: adamw_bnb_8bit, cut cross-entropy, bf16 autocast, flash attention over packed rows.
    "axolotl": Tool(training={"optimizer": "adamw-8bit"}, way={"written_out": True}, head=_no_logits),
    # arXiv 2305.14314: paged AdamW, all logits.
    "QLoRA": Tool(training={"optimizer": "paged-adamw"}, way={"written_out": True}, head=_all_logits),
    "": Tool(),
}


def tool_of(source: str) -> Tool:
    """The tool that a row is from; lorakit's own way where it is none of these."""
    return next(tool for name, tool in TOOLS.items() if source.lower().startswith(name.lower()))


def model_in(tool: Tool, spec: ModelSpec) -> ModelSpec:
    """The model as a tool has it."""
    if tool.fused_activation:
        spec = replace(spec, activation=1)
    return replace(spec, shared={}) if tool.head_of_its_own else spec


def training_in(tool: Tool, training: TrainingStep, adapted: TrainableParams) -> TrainingStep:
    """A training as a tool does it. Full fine-tuning was published in half precision only."""
    narrow = {"trained_width": 2} if adapted.full_fine_tuning else {}
    training = replace(training, **narrow | tool.training)
    if tool.way is None:
        return training
    keeps = tool.four_bit_inputs and training.quantization != "none"
    copies = {"copies": False} if adapted.full_fine_tuning else {}
    return replace(training, keeps_inputs=keeps, **tool.way | copies)


def held_in(tool: Tool, moment: Memory, spec: ModelSpec, adapted: TrainableParams, training: TrainingStep) -> Memory:
    """What lorakit's memory model says of a moment, with what the tool holds instead."""
    tokens, blocks = training.rows * training.length, 1 if training.checkpointing else len(spec.blocks)
    weights, logits, kept = moment.weights, moment.logits, 0.0
    passing = moment.moment == "loss" or moment.moment.startswith("backward")
    if tool.head and passing:
        logits = round(tool.head(spec, training)[moment.moment != "loss"])
    if tool.block and passing and not (training.checkpointing and moment.moment == "loss"):
        kept = blocks * tool.block(spec, adapted, training)
    if tool.inputs_twice and training.quantization != "none":
        kept += sum(_inputs(spec, number) for number in spec.blocks)
    if tool.head_of_its_own and training.quantization != "none":
        as_layers = tuple(replace(weight, is_head=False) for weight in spec.weights)
        whole = replace(spec, weights=as_layers)
        weights = weight_bytes(whole, training.quantization, training.double_quant, DTYPE_BYTES[training.dtype])
    return replace(moment, weights=weights, logits=logits, activations=moment.activations + round(tokens * kept))


def _inputs(spec: ModelSpec, number: int) -> float:
    """Bytes a token of what a block's layers take in, once for all that share it, in half precision."""
    shared: dict[tuple[str, str], float] = {}
    for weight in spec.blocks[number]:
        half = "attention" if spec.norms == 1 and part(weight) == "opens" else weight.sublayer
        shared.setdefault((half, part(weight)), 2.0 * weight.inner)
    return sum(shared.values())
