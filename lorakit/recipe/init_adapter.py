"""What is known of an adapter that is trained on (`adapter.from`), read from its folder without loading it."""

import json
from pathlib import Path
from typing import Any

from lorakit.recipe.adapter_file import find_fault
from lorakit.recipe.adapter_kind import adapter_folder
from lorakit.recipe.problem import Location, show_path
from lorakit.recipe.yaml_reader import plain, read_file

# Ways to begin that leave the base alone, besides PEFT's usual one (a boolean).
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_KINDS = {"use_dora": "dora", "use_rslora": "rslora"}


def read_adapter_settings(source: Path) -> dict[str, Any]:
    """Keys of the recipe's adapter section -> what they are of this adapter, as far as its folder tells."""
    known = _of_config(adapter_folder(source) / "adapter_config.json")
    recipe = source / "recipe.yaml"
    if recipe.is_file():
        node, _ = read_file(recipe, Location(recipe), "")
        section = plain(node).get("adapter") if node else None
        known |= section if isinstance(section, dict) else {}
    return known


def why_untrainable(source: Path) -> tuple[str, str] | None:
    """Why the adapter of an existing folder cannot be trained on, and what to do; None where nothing speaks against it.

    What only the weights can tell is told when they are loaded.
    """
    folder = adapter_folder(source)
    where, other = show_path(folder), "Write the folder of a run, or of an adapter that PEFT saved."
    if not (folder / "adapter_config.json").is_file():
        if (source / "model" / "config.json").is_file():
            remedy = f"Write {show_path(source / 'model')} as model.base instead."
            return f"{where} trained the weights themselves, and has no adapter", remedy
        if (source / "manifest.json").is_file():
            remedy = "Go on with lorakit train --resume, or write one of its checkpoints/step-... folders."
            return f"the training of {where} has not ended", remedy
        return f"{where} holds no adapter_config.json, nor does an adapter/ in it", other
    config = read_config(folder / "adapter_config.json")
    if config is None:
        return f"{where}/adapter_config.json is no JSON object", "It is damaged: take another copy."
    fault = find_fault(config)
    if fault:
        return f"{where}/adapter_config.json: {fault.partition('. ')[0]}", fault.partition(". ")[2]
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        return f"{where} holds an adapter of the type {kind}", "Only LoRA and DoRA adapters are trained on."
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        remedy = "Convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        return f"{where} was saved with init_lora_weights {start!r}, and belongs to a base changed by that", remedy
    if config.get("bias", "none") != "none":
        remedy = "Merge it into its base, and give the merged model as model.base."
        return f"{where} trained biases of the base as well", remedy
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "Its .bin file would run code when read: convert it to safetensors." if pickled else other
        return f"{where} has no adapter_model.safetensors", remedy
    return None


def read_config(path: Path) -> dict[str, Any] | None:
    """The mapping of an adapter_config.json; None where the file is missing or holds none."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _of_config(path: Path) -> dict[str, Any]:
    config = read_config(path)
    if config is None:
        return {}
    kind = next((word for flag, word in _KINDS.items() if config.get(flag)), "lora")
    known = {"kind": kind, "rank": config.get("r"), "alpha": config.get("lora_alpha")}
    return {} if find_fault(config) else known
