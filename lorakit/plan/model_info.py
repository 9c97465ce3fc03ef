"""What `auto` needs to know of a base model, from its config.json or the bundled table of well-known models, without
loading or fetching anything."""

import copy
import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.model.config_values import Positions, is_size, positions_of, read_json, read_layer_count, read_typed
from lorakit.model.quantization_config import CheckpointQuantization, parse_quantization
from lorakit.model.resolve import BUNDLED_MODELS, bundled_file, converted_folder
from lorakit.model.spec import ModelSpec, is_known_family, spec_from_config

_TABLE = Path(__file__).with_name("known_models.json")
# Families for which transformers (5.23) has no scaled_dot_product_attention, by `_supports_sdpa` of their classes.
_WITHOUT_SDPA = """
    big_bird bigbird_pegasus bloom codegen cpmant deepseek_v4 falcon_mamba flint gemma2 git got_ocr2 gpt_neo
    gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa hy_v4 inkling2_text mamba mamba2 megatron-bert
    mimo_v2_flash mpt mvp openai-gpt prophetnet reformer rembert roformer rwkv trocr vaultgemma xglm xlm xlnet xlstm
"""

FLASH = "flash_attention_2"


@dataclass(frozen=True)
class ModelInfo:
    """The sizes of a model, in the field's names; None where its config does not say."""

    model_type: str
    hidden_size: int
    layers: int | None = None
    attention_at: float = math.inf
    """The length in tokens at which causal attention costs as much as a layer's matrix products."""
    stored: CheckpointQuantization | None = None  # the quantization that the checkpoint has already
    spec: ModelSpec | None = None  # what it is made of, where its family is counted from the config
    dtype: str | None = None  # the number format in which the weights lie on disk
    positions: Positions | None = None  # how long a row may be; None where the model has no limit

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention implementations that the family has, of the usual three; FlashAttention of those counted."""
        sdpa = () if self.model_type in _WITHOUT_SDPA.split() else ("sdpa",)
        flash = (FLASH,) if is_known_family({"model_type": self.model_type}) else ()
        return "eager", *sdpa, *flash


def find_model_info(base: str, revision: str) -> ModelInfo | None:
    """What is known of a recipe's base model, or None when it is neither on this machine nor well known."""
    config = find_config(base, revision)
    return parse_model_info(config) if config else None


def find_config(base: str, revision: str) -> dict[str, Any] | None:
    """config.json of a recipe's base model: of a local folder, from the hub's cache, or of a well-known model. `base`:
    an absolute path, or a hub id. A `UserError` where the file is damaged."""
    local = Path(base).is_absolute() or hub_snapshot(base, revision) is not None
    # A known model sooner than a converted file, whose folder is found by its sha256.
    if not local and (known := known_config(base)):
        return known
    folder = find_model_folder(base, revision)
    return read_json(folder / "config.json") or None if folder else None


def find_model_folder(base: str, revision: str) -> Path | None:
    """The folder of a recipe's base model, where it is on this machine: a local one, or one in a cache."""
    path = Path(base) if Path(base).is_absolute() else hub_snapshot(base, revision)
    if path is None and base in BUNDLED_MODELS:
        path = bundled_file(BUNDLED_MODELS[base])
    if path and path.is_file():
        path = converted_folder(path)
    return path if path and path.is_dir() else None


def hub_snapshot(name: str, revision: str) -> Path | None:
    """The folder of a hub model in the hub's own cache (its layout: models--ORG--NAME/refs and /snapshots)."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / ("models--" + name.replace("/", "--"))
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def read_model_info(folder: Path) -> ModelInfo | None:
    """What is in a model folder's config.json; None when it cannot be read or names no hidden size. A `UserError` where
    a value in it is damaged."""
    try:
        config = read_json(folder / "config.json")
    except UserError:
        return None  # loading says what is wrong
    return parse_model_info(config)


def parse_model_info(whole: dict[str, Any]) -> ModelInfo | None:
    """What is in what a config.json holds; None when it names no hidden size. A `UserError` where a value is damaged.
    Of a family that is not counted, what its sizes may be is left to transformers."""
    config = read_typed(whole, "text_config", dict) or whole
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    if hidden is None:
        return None
    number = read_layer_count(config, "num_hidden_layers", "n_layer")
    heads = _first(config, "num_attention_heads", "n_head") or 1
    head = _first(config, "head_dim") or hidden // heads
    inner_keys = ("intermediate_size", "n_inner")
    inner = _first(config, *inner_keys) if any(map(config.get, inner_keys)) else 4 * hidden
    query, key_value = heads * head, (_first(config, "num_key_value_heads") or heads) * head
    products = 2 * query + 2 * key_value + 3 * (inner or 0)
    return ModelInfo(
        model_type=str(config.get("model_type", "unknown")),
        hidden_size=hidden,
        layers=number,
        attention_at=hidden * products / query if query and inner else math.inf,
        stored=parse_quantization(whole),
        spec=spec_from_config(whole),
        dtype=config.get("dtype") or config.get("torch_dtype") or whole.get("dtype") or whole.get("torch_dtype"),
        positions=positions_of(whole),
    )


def _first(config: dict[str, Any], *keys: str) -> int | None:
    """The size that the first of these keys gives; None where none does, or the family means something else by it."""
    if is_known_family(config):
        return next((number for key in keys if (number := read_typed(config, key, int))), None)
    return next((config[key] for key in keys if is_size(config.get(key))), None)


@functools.cache
def known_models() -> list[dict[str, Any]]:
    """The bundled table. Each entry has the hub `ids` of models of one `config`, as config.json has it, their number of
    `parameters`, as their hub pages count them, and its `source`."""
    models: list[dict[str, Any]] = json.loads(_TABLE.read_text(encoding="utf-8"))["models"]
    return models


def known_config(hub_id: str) -> dict[str, Any] | None:
    """config.json of a hub model, reduced to what sizes it (with `dtype`, the type in which it is stored); else None.
    Letter case does not matter. Quantized repackagings have other ids and are not known."""
    ids = {known.lower(): model["config"] for model in known_models() for known in model["ids"]}
    return copy.deepcopy(ids.get(hub_id.lower()))
