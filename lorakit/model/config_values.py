"""Values of a config.json, checked before anything is counted with them: a damaged one is a UserError that names it,
and one that is not there is None. And how many positions a model has: a limit where each has an embedding, else what it
was trained on (rotations).

Which of both a family has, and what its config calls the number, is found in transformers' source, read as text:
`lorakit check` imports no torch, and the library's modules do.
"""

import functools
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from lorakit.errors import BaseModelError, UserError
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
        raise BaseModelError(f"{path}: damaged: it is not valid JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{path}: damaged: it is not a mapping. Fetch the model again.")
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
    return BaseModelError(f"config.json: {key} is {shown}, not {expected}. Fetch the model again.")


# A table with a row a position: an embedding, learned or of sinusoids, or one that a rotation is looked up in.
_TABLE = re.compile(
    r"class \w*Position(?:al)?Embeddings?\(nn\.Embedding\)"
    r"|nn\.Embedding\(\s*(?:config\.)?(?:max_position_embeddings|n_positions)"
    r"|create_sinusoidal_positions\(|positional_encoding\(config\.n_positions"
)
_ROTARY = re.compile(r"RotaryEmbedding|apply_rotary|rotary_emb")
_TYPE = re.compile(r"[A-Za-z0-9_.-]+")
# Families whose max_position_embeddings has the factor in it, though they name no original length (vLLM's config.py).
_SCALED_ALREADY = ("gemma3", "gemma3_text")


@dataclass(frozen=True)
class Positions:
    """The positions of a model, as its config names them."""

    limit: int
    hard: bool  # whether the model cannot compute a later position; else it was not trained on any
    key: str  # where it is from, such as `n_positions in its config.json`


def positions_of(config: dict[str, Any]) -> Positions | None:
    """The positions of the model of a config.json; None where it has no limit, or its family is not known here."""
    text = read_typed(config, "text_config", dict) or config
    family = text.get("model_type")
    if not isinstance(family, str) or not _TYPE.fullmatch(family) or text.get("alibi") is True:
        return None
    modeling, configuration = _source(family)
    own = next((part for part in configuration.split("\nclass ") if f'model_type = "{family}"' in part), configuration)
    mapped = re.search(r'"max_position_embeddings": "(\w+)"', own)
    name = mapped[1] if mapped else "max_position_embeddings"
    default = re.search(rf"^    {name}: [^=\n]+= (\d+)$", own, re.MULTILINE)
    limit = int(default[1]) if default else None
    key = f"{name}, by transformers' default"
    if is_size(text.get(name)):
        limit, key = text[name], f"{name} in its config.json"
    has_table = _TABLE.search(modeling)
    if limit is None or not (has_table or _ROTARY.search(modeling)):
        return None
    if has_table:
        # RoBERTa counts from after the padding token, so that no token has the rows before.
        skips = "create_position_ids_from_input_ids" in modeling and "self.offset = 2" not in modeling
        padding = text.get("pad_token_id", 1)
        return Positions(limit - ((padding if isinstance(padding, int) else 1) + 1 if skips else 0), True, key)
    stretched = _stretched(text, limit)
    return Positions(stretched, False, key if stretched == limit else f"{key}, stretched by rope_scaling")


@functools.cache
def _source(model_type: str) -> tuple[str, str]:
    """transformers' own source of a family: its modeling and its configuration; empty where there is none."""
    library = importlib.util.find_spec("transformers")
    if not (library and library.origin):
        return "", ""
    models, own = Path(library.origin).parent / "models", model_type.replace("-", "_")

    def read(*parts: str) -> str:
        path = models.joinpath(*parts)
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    quoted = re.escape(model_type)
    named = re.findall(rf'\("{quoted}", "(\w+?)(?:LMHeadModel|ForCausalLM)"\)', read("auto", "modeling_auto.py"))
    mapped = re.findall(rf'\("{quoted}", "(\w+)"\)', read("auto", "auto_mappings.py"))
    folders = [own, *mapped, *(name.lower() for name in named)]

    def first(kind: str) -> str:
        texts = ("".join(read(folder, f"{kind}_{name}.py") for name in {folder, own}) for folder in folders)
        return next(filter(None, texts), "")

    return first("modeling"), first("configuration")


def _stretched(text: dict[str, Any], limit: int) -> int:
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(scaling, dict) or text.get("model_type") in _SCALED_ALREADY:
        return limit
    stretched = [limit]
    for layers in [one for one in scaling.values() if isinstance(one, dict)] or [scaling]:  # of each kind, or of all
        key, factor = "original_max_position_embeddings", layers.get("factor")
        original = layers.get(key, text.get(key))
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            stretched.append(int((original if is_size(original) else limit) * factor))
    return max(stretched)
