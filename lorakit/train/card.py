"""The model card of an adapter, or of a model trained whole."""

import json
from pathlib import Path
from typing import Any

from lorakit.recipe.adapter_kind import adapter_spec, effective_model, initial_adapter
from lorakit.recipe.init_adapter import read_adapter_settings
from lorakit.recipe.schema import Recipe

_CARD = """\
---
base_model: {base}
library_name: {library}
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{what} `{base}`, trained with lorakit {version}.

| | |
|---|---|
| base model | `{base}`, revision `{revision}` ({origin}) |
| quantization while training | {quantization} |
| trained | {trained}{trainable:,} of {total:,} parameters |
| training rows | {rows:,} ({trained_tokens:,} trained tokens an epoch) |
| steps | {steps} of {batch_size} rows, learning rate {learning_rate:g}, {schedule} |
| held-out loss | {eval_loss} |
| answers end with | {stops} |
| prompts | {prompts} |

## Use

```python
{use}
```

The run's folder also has the recipe that repeats this run, and the manifest with every version and checksum.
"""


_ADAPTER_USE = """\
from peft import PeftModel
from transformers import {imports}

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"{load}), "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")"""
_MODEL_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")"""


_FOUR_BITS = (
    ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{kind}", '
    "bnb_4bit_use_double_quant={{double}})"
)
_LOADS = {
    "nf4": _FOUR_BITS.format(kind="nf4"),
    "q4": _FOUR_BITS.format(kind="fp4"),
    "q8": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
}


def adapter_card(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """The text of `adapter/README.md`."""
    adapter, model = recipe.adapter, effective_model(recipe)
    source = initial_adapter(adapter)
    if source:
        kind = read_adapter_settings(Path(source)).get("kind", "lora")
        trained = f"the adapter that began as {Path(source).name}, "
    else:
        kind = adapter_spec(adapter).name
        saved = "saved as LoRA of twice the rank, " if kind in ("pissa", "olora") else ""
        trained = f"{kind}, rank {adapter.rank}, alpha {adapter.alpha:g}, {saved}"
    revision = "" if model.revision == "main" else f', revision="{model.revision}"'
    load = _LOADS.get(model.quantization, "").format(double=model.double_quant)
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if load else "")
    return _CARD.format(
        what=f"A{'n' if str(kind)[0] in 'aeiou' else ''} {kind} adapter for",
        tags="lora, lorakit",
        library="peft",
        trained=trained,
        use=_ADAPTER_USE.format(base=model.base, load=revision + load, imports=imports),
        **_facts(recipe, manifest),
    )


def model_card(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """The text of `model/README.md`."""
    parameters = manifest["parameters"]
    return _CARD.format(
        what="All weights of" if parameters["trainable"] == parameters["total"] else "Weights of",
        tags="lorakit",
        library="transformers",
        trained="the weights themselves, ",
        use=_MODEL_USE,
        **_facts(recipe, manifest),
    )


def _facts(recipe: Recipe, manifest: dict[str, Any]) -> dict[str, Any]:
    result, train, model = manifest["result"], manifest["data"]["train"], recipe.model
    loss = result["eval_loss"]
    variables = f", with the variables `{json.dumps(model.template_variables)}`" if model.template_variables else ""
    day = [f"with the date {model.template_date}"] if model.template_date else []
    return {
        "base": model.base,
        "name": recipe.name,
        "version": manifest["versions"].get("lorakit", ""),
        "revision": model.revision,
        "origin": manifest["base"]["origin"],
        "quantization": manifest["base"]["quantization"],
        **manifest["parameters"],
        "rows": train["kept"],
        "trained_tokens": train["trained_tokens"],
        "steps": result["steps"],
        "batch_size": recipe.train.batch_size,
        "learning_rate": recipe.train.learning_rate,
        "schedule": recipe.train.schedule,
        "eval_loss": "no held-out rows" if loss is None else f"{loss:.4f} (step {result['best_step']})",
        "prompts": "; ".join([f"the chat template's{variables}", *day, *train.get("notes", {})]),
        "stops": ", ".join(f"`{token}`" for token in train["stop_tokens"]),
    }
