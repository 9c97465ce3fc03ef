"""Published peaks of GPU memory, and what lorakit's memory model says of the same settings in the same software.

Other tools hold other things than lorakit does: published_tools.py says what.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published_tools import held_in, model_in, tool_of, training_in

from lorakit.model.spec import ModelSpec, spec_from_config
from lorakit.plan.activations import TrainingStep
from lorakit.plan.memory import Memory, memory_by_moment
from lorakit.plan.model_info import known_config
from lorakit.plan.trainable_params import count_trainable
from lorakit.recipe.schema import Adapter

PUBLISHED = Path(__file__).with_name("published_memory.csv")

# How these tables write a model that the hub has under another name.
_NAMES = {"swiss-ai/Apertus-8B": "swiss-ai/Apertus-8B-2509", "mistralai/Devstral-24B": "mistralai/Devstral-Small-2505"}
# The sizes of a model that lorakit does not bundle, as fitcheck's measurements record them.
_SIZES = {
    "deepseek-ai/deepseek-coder-1.3b-instruct": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5504,
        "vocab_size": 32256,
        "tie_word_embeddings": False,
    }
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
            config = _SIZES.get(row["model"]) or known_config(_NAMES.get(row["model"], row["model"]))
            spec = spec_from_config(config) if config else None
            if missing:
                yield Compared(row, None, f"says nothing of {', '.join(missing)}")
            elif spec is None:
                yield Compared(row, None, "its sizes are not known here")
            else:
                yield Compared(row, predicted(row, spec))


def _needed(row: dict[str, str]) -> list[str]:
    shape = [] if row["method"] == "full" else ["rank", "targets"]
    return [*shape, "sequence_length", "micro_batch", "gradient_checkpointing", "peak_gib"]


def predicted(row: dict[str, str], spec: ModelSpec) -> Memory:
    """What the memory model says of one row, in the software that the row is from."""
    tool, rows, length = tool_of(row["source"]), int(row["micro_batch"]), int(row["sequence_length"])
    adapted = count_trainable(spec, _adapter(row))
    asked = TrainingStep(
        rows=rows,
        length=length,
        trained=rows * length,
        quantization="nf4" if "nf4" in row["method"] else "none",
        double_quant=row["method"].endswith("-dq"),
        attention="flash_attention_2" if row["attention"] == "flash" else row["attention"] or "sdpa",
        checkpointing=row["gradient_checkpointing"] == "yes",
        masked=rows > 1 and row["packed"] != "yes",
    )
    model, training = model_in(tool, spec), training_in(tool, asked, adapted)
    moments = memory_by_moment(model, adapted, training)
    return max((held_in(tool, one, model, adapted, training) for one in moments), key=lambda memory: memory.total)


def _adapter(row: dict[str, str]) -> Adapter:
    if row["method"] == "full":
        return Adapter.model_validate({"kind": "none"})
    named, kind = row["targets"], "dora" if row["method"] == "dora" else "lora"
    targets: Any = named if named in ("all-linear", "attention", "mlp") else [f"{n}_proj" for n in named.split()]
    return Adapter.model_validate({"kind": kind, "rank": int(row["rank"]), "targets": targets})
