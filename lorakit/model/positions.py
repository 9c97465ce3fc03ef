"""How many positions a model has: a limit where each has an embedding, what it was trained on where angles tell it.

Which of both a family does, and what its config calls the number, transformers' own source says. It is read as text:
`lorakit check` imports no torch, and the library's modules do.
"""

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.model.config_values import is_size, read_mapping

# A table with a row a position: an embedding, learned or of sinusoids, or one that a rotation is looked up in.
_TABLE = re.compile(
    r"class \w*Position(?:al)?Embeddings?\(nn\.Embedding\)"
    r"|nn\.Embedding\(\s*(?:config\.)?(?:max_position_embeddings|n_positions)"
    r"|create_sinusoidal_positions\(|positional_encoding\(config\.n_positions"
)
_ROTARY = re.compile(r"RotaryEmbedding|apply_rotary|rotary_emb")
_NAMED = re.compile(r"^pos|_pos|^wpe$")
_TYPE = re.compile(r"[A-Za-z0-9_.-]+")
# Families whose max_position_embeddings has the factor in it, though they name no original length (vLLM's config.py).
_SCALED_ALREADY = ("gemma3", "gemma3_text")
# Rows that a position embedding may have more than positions, which some families leave unused.
_MOST_SPARE = 2


@dataclass(frozen=True)
class Positions:
    """The positions of a model, as its config names them."""

    limit: int
    hard: bool
    """Whether the model cannot compute a later position; else it was not trained on any."""
    key: str
    """What says so, such as `n_positions in its config.json`."""


def positions_of(config: dict[str, Any]) -> Positions | None:
    """The positions of the model of a config.json; None where it has no limit, or its family is not known here."""
    text = read_mapping(config, "text_config") or config
    family = text.get("model_type")
    source = _source(family) if isinstance(family, str) and _TYPE.fullmatch(family) else None
    if source is None or text.get("alibi") is True:
        return None
    name, default = _field(str(family), source.configuration)
    if is_size(text.get(name)):
        limit, said = text[name], f"{name} in its config.json"
    elif default:
        limit, said = default, f"{name}, by transformers' default"
    else:
        return None
    if _TABLE.search(source.modeling):
        return Positions(limit - _unused(source.modeling, text), True, said)
    if not _ROTARY.search(source.modeling):
        return None
    stretched = _stretched(text, limit)
    return Positions(stretched, False, said if stretched == limit else f"{said}, stretched by rope_scaling")


def learned_positions(model: Any) -> int | None:
    """How many positions a model in memory has a row for; None where it computes any.

    Args:
        model: a causal language model, or a PEFT model around one.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    if named is None or not is_size(named):
        return None
    limit = int(named)
    tables = [(path, module.num_embeddings, module) for path, module in causal.named_modules() if _is_table(module)]
    tables += [(path, len(value), None) for path, value in causal.named_buffers() if value.ndim > 1]
    found = []
    for path, rows, module in tables:
        if _NAMED.search(path.rpartition(".")[2]) and limit <= rows <= limit + _MOST_SPARE:
            found.append(rows - _skipped(module))
    return min(found, default=None)


def _skipped(module: Any) -> int:
    """The first rows of a table that no position has: OPT's offset, RoBERTa's padding token and what stands before."""
    padding, offset = getattr(module, "padding_idx", None), getattr(module, "offset", None)
    return int(offset) if offset else 0 if padding is None else int(padding) + 1


def _is_table(module: Any) -> bool:
    return hasattr(module, "num_embeddings") and hasattr(module, "weight")


@dataclass(frozen=True)
class _Source:
    modeling: str
    configuration: str


@functools.cache
def _source(model_type: str) -> _Source | None:
    """transformers' own source of a family: its modeling and its configuration."""
    spec = importlib.util.find_spec("transformers")
    if not (spec and spec.origin):
        return None
    models, own = Path(spec.origin).parent / "models", model_type.replace("-", "_")
    mapped = re.findall(rf'\("{re.escape(model_type)}", "(\w+)"\)', _text(models / "auto" / "auto_mappings.py"))
    classes = re.findall(rf'\("{re.escape(model_type)}", "(\w+?)(?:LMHeadModel|ForCausalLM)"\)', _auto(models))
    folders = [own, *mapped, *(name.lower() for name in classes)]
    modeling, configuration = _first(models, "modeling", folders, own), _first(models, "configuration", folders, own)
    return _Source(modeling, configuration) if modeling else None


def _auto(models: Path) -> str:
    return _text(models / "auto" / "modeling_auto.py")


def _first(models: Path, kind: str, folders: list[str], own: str) -> str:
    """The source of this kind in the first of several folders that has one."""
    found = ("".join(_text(models / folder / f"{kind}_{name}.py") for name in {folder, own}) for folder in folders)
    return next((text for text in found if text), "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _field(model_type: str, configuration: str) -> tuple[str, int | None]:
    """What a family's config calls its positions, and their number where it says none."""
    parts = configuration.split("\nclass ")
    own = next((part for part in parts if f'model_type = "{model_type}"' in part), configuration)
    mapped = re.search(r'"max_position_embeddings": "(\w+)"', own)
    name = mapped[1] if mapped else "max_position_embeddings"
    default = re.search(rf"^    {name}: [^=\n]+= (\d+)$", own, re.MULTILINE)
    return name, int(default[1]) if default else None


def _unused(modeling: str, text: dict[str, Any]) -> int:
    """Rows of the table that no token has: RoBERTa's count from behind the padding token."""
    counts_padding = "create_position_ids_from_input_ids" in modeling and "self.offset = 2" not in modeling
    padding = text.get("pad_token_id", 1)
    return (padding if isinstance(padding, int) else 1) + 1 if counts_padding else 0


def _stretched(text: dict[str, Any], limit: int) -> int:
    """The positions with what `rope_scaling` stretches them to."""
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(scaling, dict) or text.get("model_type") in _SCALED_ALREADY:
        return limit
    layers = [one for one in scaling.values() if isinstance(one, dict)] or [scaling]  # of each kind of layer, or of all
    return max([limit, *(_scaled(one, text, limit) for one in layers)])


def _scaled(scaling: dict[str, Any], text: dict[str, Any], limit: int) -> int:
    original = scaling.get("original_max_position_embeddings", text.get("original_max_position_embeddings"))
    factor = scaling.get("factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool):
        return limit
    start = int(original) if original is not None and is_size(original) else limit
    return int(start * factor)
