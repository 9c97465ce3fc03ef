"""The model card of an adapter."""

from typing import Any

from lorakit.recipe.schema import Recipe

_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, lorakit]
---

# {name}

A {kind} adapter for `{base}`, trained with lorakit {version}.

| | |
|---|---|
| base model | `{base}`, revision `{revision}` ({origin}) |
| quantization while training | {quantization} |
| adapter | {kind}, rank {rank}, alpha {alpha:g}, {trainable:,} trainable parameters |
| training rows | {rows:,} ({trained_tokens:,} trained tokens an epoch) |
| steps | {steps} of {batch_size} rows, learning rate {learning_rate:g}, {schedule} |
| held-out loss | {eval_loss} |
| answers end with | {stops} |

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")
```

The recipe that repeats this run and the manifest with every version and checksum lie beside this folder.
"""


def adapter_card(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """The text of `adapter/README.md`."""
    result, train = manifest["result"], manifest["data"]["train"]
    loss = result["eval_loss"]
    return _CARD.format(
        name=recipe.name,
        base=recipe.model.base,
        revision=recipe.model.revision,
        origin=manifest["base"]["origin"],
        quantization=recipe.model.quantization,
        kind=recipe.adapter.kind,
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        trainable=manifest["parameters"]["trainable"],
        version=manifest["versions"].get("lorakit", ""),
        rows=train["kept"],
        trained_tokens=train["trained_tokens"],
        steps=result["steps"],
        batch_size=recipe.train.batch_size,
        learning_rate=recipe.train.learning_rate,
        schedule=recipe.train.schedule,
        eval_loss="no held-out rows" if loss is None else f"{loss:.4f} (step {result['best_step']})",
        stops=", ".join(f"`{token}`" for token in train["stop_tokens"]),
    )
