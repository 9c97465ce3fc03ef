"""Values of a config.json, checked before anything is counted with them: a damaged one is a UserError that names it,
and one that is not there is None."""

import json
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

Value = TypeVar("Value")

_EXPECTED: dict[type, str] = {int: "a whole number of at least 1", bool: "true or false", dict: "a mapping"}
# More layers than any model has: a damaged config with more would be counted, or built, for hours.
_MOST_LAYERS = 1_000


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a model; an empty one where there is no file, UserError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: it is not valid JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: it is not a mapping. Fetch the model again.")
    return content


def read_typed(config: dict[str, Any], key: str, kind: type[Value]) -> Value | None:
    """The value of a key: a mapping, true or false, or, where an int is asked for, a whole number of at least 1."""
    value: Any = config.get(key)
    if value is None or (is_size(value) if kind is int else isinstance(value, kind)):
        return value
    raise damaged_value(key, value, _EXPECTED[kind])


def read_layer_count(config: dict[str, Any], *keys: str) -> int | None:
    """The number of layers that the first of these keys gives as a whole number."""
    key = next((key for key in keys if is_size(config.get(key))), None)
    if key and config[key] > _MOST_LAYERS:
        raise damaged_value(key, config[key], f"a whole number from 1 to {_MOST_LAYERS:,}")
    return config[key] if key else None


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json, for a model whose input and output embeddings are two weights."""
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return changed


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number of at least 1. true and false are none, though Python counts with them."""
    return type(value) is int and value >= 1


def damaged_value(key: str, value: Any, expected: str) -> UserError:
    """The error that names a damaged value, and what belongs in its place."""
    shown = one_line(json.dumps(value), 43)
    return UserError(f"model.base: config.json: {key} is {shown}, not {expected}. Fetch the model again.")
