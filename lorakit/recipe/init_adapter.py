"""An adapter that already exists, as its folder describes it without loading it: for `adapter.from` and for merging."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lorakit.atomic_io import read_json_object, refuse_pipes
from lorakit.errors import UserError
from lorakit.recipe.adapter_kind import adapter_folder
from lorakit.recipe.fields import PositiveInt
from lorakit.recipe.problem import Location, show_path
from lorakit.recipe.schema_introspection import accepts
from lorakit.recipe.yaml_reader import plain, read_file

# Ways to begin that leave the base alone, besides PEFT's usual one (a boolean).
PLAIN_INITS = ("gaussian", "eva", "orthogonal")
TokenId = Annotated[int, Field(ge=0)]
_NAMES = "a text or a list of names", str | list[str] | None
_LORA_KEYS: dict[str, tuple[str, Any]] = {
    "r": ("a whole number above 0", PositiveInt),
    "lora_alpha": ("a number", float),
    "lora_dropout": ("a number", float),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "target_parameters": ("a list of names", list[str] | None),
    "modules_to_save": ("a list of names", list[str] | None),
    "rank_pattern": ("a mapping of names to whole numbers above 0", dict[str, PositiveInt]),
    "alpha_pattern": ("a mapping of names to numbers", dict[str, float]),
    "trainable_token_indices": (
        "a list of token ids, or a mapping of names to such lists",
        list[TokenId] | dict[str, list[TokenId]] | None,
    ),
    "layers_to_transform": ("a whole number or a list of them", int | list[int] | None),
}
"""Keys of a LoRA's adapter_config.json: what PEFT needs there, in words and as a type."""


def read_adapter_settings(source: Path) -> dict[str, Any]:
    """Keys of the recipe's adapter section -> what they are of this adapter, as far as its folder tells."""
    config = read_json_object(adapter_folder(source) / "adapter_config.json")
    known: dict[str, Any] = {}
    if config is not None and not find_fault(config):
        kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        known = {"kind": kind, "rank": config.get("r"), "alpha": config.get("lora_alpha")}
    node, _ = read_file(source / "recipe.yaml", Location())
    section = plain(node).get("adapter") if node else None
    return known | (section if isinstance(section, dict) else {})


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder; UserError where it has none, one that lorakit cannot take, or no
    weights beside it."""
    where = show_path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            remedy = "Write the folder of a run, or of an adapter that PEFT saved."
            if (folder / "adapter_model.bin").is_file():
                remedy = "Its adapter_model.bin would run code when read: convert it to safetensors."
            raise UserError(f"{where} has no {name}, so it holds no adapter. {remedy}")
    refuse_pipes(folder)
    config = read_json_object(folder / "adapter_config.json")
    fault = "not a JSON object. It is damaged: take another copy." if config is None else find_fault(config)
    if config is None or fault:
        raise UserError(f"{where}/adapter_config.json: {fault}")
    return config


def why_untrainable(source: Path) -> tuple[str, str] | None:
    """Why the adapter of an existing folder cannot be trained on, and what to do; None where nothing speaks against it.

    What only the weights can tell is told when they are loaded.
    """
    folder = adapter_folder(source)
    where = show_path(folder)
    if not (folder / "adapter_config.json").is_file():
        if (source / "model" / "config.json").is_file():
            remedy = f"Write {show_path(source / 'model')} as model.base instead."
            return f"{where} trained the weights themselves, and has no adapter", remedy
        if (source / "manifest.json").is_file():
            remedy = "Go on with lorakit train --resume, or write one of its checkpoints/step-... folders."
            return f"the training of {where} has not ended", remedy
    try:
        config = read_adapter_config(folder)
    except UserError as error:
        reason, _, remedy = str(error).partition(". ")
        return reason, remedy
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        return f"{where} holds an adapter of the type {kind}", "Only LoRA and DoRA adapters are trained on."
    if isinstance(start, str) and start not in PLAIN_INITS:
        remedy = "Convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        return f"{where} was saved with init_lora_weights {start!r}, and belongs to a base changed by that", remedy
    if config.get("bias", "none") != "none":
        remedy = "Merge it into its base, and give the merged model as model.base."
        return f"{where} trained biases of the base as well", remedy
    return None


def find_fault(config: dict[str, Any]) -> str:
    """Why lorakit cannot take an adapter_config.json, with what to do; empty where it can."""
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        return f"base_model_name_or_path is {json.dumps(base)[:60]}, not the name of a base model. Correct it."
    if config.get("peft_type") != "LORA":
        return ""
    if config.get("megatron_config") is not None:
        module = json.dumps(config.get("megatron_core", "megatron.core"))[:80]
        return (
            f"megatron_config makes PEFT import and run a Python module (megatron_core: {module}), which lorakit does "
            "not. Take the key out."
        )
    if config.get("alora_invocation_tokens") is not None:
        return (
            "alora_invocation_tokens: it is an aLoRA, which takes effect after certain tokens only. lorakit computes "
            "an adapter at every token, so it would score and train another model. Use PEFT itself."
        )
    for key, (needed, kind) in _LORA_KEYS.items():
        if key in config and not accepts(kind, config[key]):
            given = json.dumps(config[key])[:60]
            return f"{key} is {given}, and PEFT needs {needed}. Correct it, or take another copy."
    return ""
