"""What is known of an adapter that is trained on (`adapter.from`), read from its folder without loading it."""

import json
from pathlib import Path
from typing import Any

from lorakit.recipe.files import read_file
from lorakit.recipe.kinds import adapter_folder
from lorakit.recipe.problems import Place
from lorakit.recipe.strict_yaml import plain

_KINDS = {"use_dora": "dora", "use_rslora": "rslora"}


def brought(source: Path) -> dict[str, Any]:
    """Keys of the recipe's adapter section -> what they are of this adapter, as far as its folder tells."""
    known = _of_config(adapter_folder(source) / "adapter_config.json")
    recipe = source / "recipe.yaml"
    if recipe.is_file():
        node, _ = read_file(recipe, Place(recipe), "")
        section = plain(node).get("adapter") if node else None
        known |= section if isinstance(section, dict) else {}
    return known


def _of_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    kind = next((word for flag, word in _KINDS.items() if config.get(flag)), "lora")
    return {"kind": kind, "rank": config.get("r"), "alpha": config.get("lora_alpha")}
