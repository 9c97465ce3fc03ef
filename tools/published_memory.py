"""Published peaks of GPU memory, and what lorakit's memory model says of the same settings in the same software.

Other tools hold other things than lorakit does. What is known of each stands in STACKS, from its code or its paper; no
number in it is fitted to a figure.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.model.counted import counted
from lorakit.model.skeleton import Skeleton
from lorakit.plan.activations import Way
from lorakit.plan.adapted import adapted_by
from lorakit.plan.known import known_config
from lorakit.plan.memory import Memory, Training, training_memory
from lorakit.recipe.schema import Adapter

PUBLISHED = Path(__file__).with_name("published_memory.csv")

# How these tables write a model that the hub has under another name.
_NAMES = {"swiss-ai/Apertus-8B": "swiss-ai/Apertus-8B-2509", "mistralai/Devstral-24B": "mistralai/Devstral-Small-2505"}
_MODULES = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@dataclass(frozen=True)
class Stack:
    """What a tool does differently from lorakit, as far as memory hangs on it."""

    words: str
    training: dict[str, Any]
    """Fields of Training."""
    way: dict[str, Any]
    """Fields of Way; of an empty one lorakit's own way is taken."""
    four_bit_inputs: bool = False
    """Whether its bitsandbytes keeps the input of every 4-bit layer."""
    fused_activation: bool = False
    """Whether it computes an activation in one operation that transformers writes out in several."""


STACKS = {
    # litgpt at commit 8641822 (the table's own): bf16-true, so adapter, gradients and AdamW are in bfloat16; queries,
    # keys and values in one layer, of which the parts are views; its default dropout 0.05 (finetune/lora.py);
    # torch.nn.functional.gelu; bitsandbytes 0.41.1, whose MatMul4Bit keeps (A, B).
    "litgpt": Stack(
        "all in bfloat16, dropout 0.05, fused q k v",
        {"trained_width": 2, "head": "full"},
        {"autocast": False, "dropout": 0.05, "packed_qkv": True},
        four_bit_inputs=True,
        fused_activation=True,
    ),
    # peft method_comparison/MetaMathQA (default_training_params.json, run.py): bfloat16 without autocast, the adapter
    # in float32 (autocast_adapter_dtype), so that each adapted layer copies its input; full fine-tuning in bfloat16.
    "peft": Stack(
        "bfloat16 without autocast, the adapter in float32", {"head": "full"}, {"autocast": False, "copies": True}
    ),
    # axolotl examples/*.yaml: adamw_bnb_8bit, cut cross-entropy, bf16 autocast, flash attention over packed rows.
    "axolotl": Stack("8-bit AdamW, cut cross-entropy", {"optimizer": "adamw-8bit", "head": "cut"}, {}),
    # QLoRA (arXiv 2305.14314): paged AdamW, all logits.
    "QLoRA": Stack("paged AdamW, all logits", {"optimizer": "paged-adamw", "head": "full"}, {}),
    "": Stack("as lorakit", {}, {}),
}


@dataclass(frozen=True)
class Compared:
    """One row of a table, and the prediction; None where the row does not say enough."""

    row: dict[str, str]
    memory: Memory | None
    why: str = ""

    @property
    def is_bound(self) -> bool:
        """Whether the published figure is only what it stays under."""
        return "bound" in self.row["quantity"]

    @property
    def error(self) -> float | None:
        """Predicted over published, less one."""
        return self.memory.allocated / 2**30 / float(self.row["peak_gib"]) - 1 if self.memory else None


def compared(path: Path = PUBLISHED) -> Iterator[Compared]:
    """Every row of a table with the columns of published_memory.csv, with its prediction."""
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            missing = [name for name in _needed(row) if not row[name]]
            config = known_config(_NAMES.get(row["model"], row["model"]))
            skeleton = counted(config) if config else None
            if missing:
                yield Compared(row, None, f"says nothing of {', '.join(missing)}")
            elif skeleton is None:
                yield Compared(row, None, "its sizes are not known here")
            else:
                yield Compared(row, predicted(row, skeleton))


def _needed(row: dict[str, str]) -> list[str]:
    shape = [] if row["method"] == "full" else ["rank", "targets"]
    return [*shape, "sequence_length", "micro_batch", "gradient_checkpointing", "peak_gib"]


def predicted(row: dict[str, str], skeleton: Skeleton) -> Memory:
    """What the memory model says of one row, in the software that the row is from."""
    stack = next(found for name, found in STACKS.items() if name.lower() in row["source"].lower())
    full, quantization = row["method"] == "full", "nf4" if "nf4" in row["method"] else "none"
    if full:
        settings = Adapter.model_validate({"kind": "none"})
    else:
        named = row["targets"]
        targets: Any = named if named in ("all-linear", "attention", "mlp") else [_MODULES[n] for n in named.split()]
        settings = Adapter.model_validate({"rank": int(row["rank"]), "targets": targets})
    rows, length = int(row["micro_batch"]), int(row["sequence_length"])
    packed = row["packed"] == "yes"
    training = Training(
        rows=rows,
        length=length,
        trained=rows * length,
        quantization=quantization,
        double_quant=row["method"].endswith("-dq"),
        attention="flash_attention_2" if row["attention"] == "flash" else row["attention"] or "sdpa",
        checkpointing=row["gradient_checkpointing"] == "yes",
        masked=rows > 1 and not packed,
        **({"trained_width": 2} if full else {}) | stack.training,
    )
    if stack.way:
        way = {"copies": False} if full else {}
        keeps = stack.four_bit_inputs and quantization != "none"
        masked = rows > 1 and not packed
        training = replace(training, way=Way(width=2, masked=masked, keeps_inputs=keeps, **stack.way | way))
    if stack.fused_activation:
        skeleton = replace(skeleton, activation=1)
    return training_memory(skeleton, adapted_by(skeleton, settings), training)
