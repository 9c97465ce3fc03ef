"""What an adapter's `adapter_config.json` may say: values that PEFT computes with, and no code to import."""

import json
from collections.abc import Callable
from typing import Any


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _all(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(holds(part) for part in value)


def _each(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(holds(part) for part in value.values())


def _names(value: Any) -> bool:
    return value is None or _is_text(value) or _all(value, _is_text)


def _list_of_names(value: Any) -> bool:
    return value is None or _all(value, _is_text)


# Of a LoRA: what a key must be, and whether a value is that.
_LORA: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number above 0", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number", _is_number),
    "target_modules": ("a text or a list of names", _names),
    "exclude_modules": ("a text or a list of names", _names),
    "target_parameters": ("a list of names", _list_of_names),
    "modules_to_save": ("a list of names", _list_of_names),
    "rank_pattern": ("a mapping of names to whole numbers above 0", lambda value: _each(value, _is_rank)),
    "alpha_pattern": ("a mapping of names to numbers", lambda value: _each(value, _is_number)),
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda value: value is None or _is_whole(value) or _all(value, _is_whole),
    ),
}


def find_fault(config: dict[str, Any]) -> str:
    """Why an adapter's configuration cannot be taken, with what to do; empty where nothing speaks against it."""
    base = config.get("base_model_name_or_path")
    if base is not None and not _is_text(base):
        return f"base_model_name_or_path is {json.dumps(base)[:60]}, not the name of a base. Correct it."
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
            "alora_invocation_tokens: it is an aLoRA, which takes effect behind certain tokens only. lorakit computes "
            "an adapter at every token, so it would score and train another model. Use PEFT itself."
        )
    for key, (wanted, holds) in _LORA.items():
        if key in config and not holds(config[key]):
            given = json.dumps(config[key])[:60]
            return f"{key} is {given}, and PEFT needs {wanted}. Correct it, or take another copy."
    return ""
