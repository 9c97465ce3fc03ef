"""The base model before its weights are loaded: what its config.json or the bundled table of known models says, what a
run would refuse of its files, and its chat template. Without torch, but for the tokenizer; nothing is fetched."""

import copy
import functools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import BaseModelError, UserError
from lorakit.model.base_files import check_base_files, has_tokenizer
from lorakit.model.config_values import Positions, is_size, positions_of, read_json, read_layer_count, read_typed
from lorakit.model.quantization_config import CheckpointQuantization, parse_quantization, refuse_irreversible
from lorakit.model.resolve import BUNDLED_MODELS, Base, bundled_file, converted_folder
from lorakit.model.spec import ModelSpec, is_known_family, spec_from_config
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.attention import is_plain_attention
from lorakit.recipe.chat_templates import is_named, template_file
from lorakit.recipe.export_target import parse_target
from lorakit.recipe.schema import Model, Recipe, Spectrum

if TYPE_CHECKING:
    from lorakit.data.chat_template import ChatTemplate

_TABLE = Path(__file__).with_name("known_models.json")
# Families for which transformers (5.23) has no scaled_dot_product_attention, by `_supports_sdpa` of their classes.
_WITHOUT_SDPA = """
    big_bird bigbird_pegasus bloom codegen cpmant deepseek_v4 falcon_mamba flint gemma2 git got_ocr2 gpt_neo
    gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa hy_v4 inkling2_text mamba mamba2 megatron-bert
    mimo_v2_flash mpt mvp openai-gpt prophetnet reformer rembert roformer rwkv trocr vaultgemma xglm xlm xlnet xlstm
"""

_FLASH = ("flash_attention_2", "flash_attention_3")


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
    plain_attention: bool = False  # whether variable-length attention can compute what its config says

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention implementations that the family has; FlashAttention and torch's own of those counted."""
        sdpa = () if self.model_type in _WITHOUT_SDPA.split() else ("sdpa",)
        flash = _FLASH if is_known_family({"model_type": self.model_type}) else ()
        varlen = ("varlen",) if sdpa and flash and self.plain_attention else ()
        return "eager", *sdpa, *flash, *varlen


def find_model_info(base: str, revision: str, add_tokens: Sequence[str] = ()) -> ModelInfo | None:
    """What is known of a recipe's base model, or None when it is neither on this machine nor well known."""
    config = find_config(base, revision)
    return parse_model_info(with_added_rows(config, base, revision, add_tokens)) if config else None


def with_added_rows(config: dict[str, Any], base: str, revision: str, add_tokens: Sequence[str]) -> dict[str, Any]:
    """A base's config.json with as many rows of embeddings as `model.add_tokens` needs: one more each, but for those
    that the base has more than tokens, where its tokenizer.json is here."""
    section = config if is_size(config.get("vocab_size")) else config.get("text_config")
    if not add_tokens or not isinstance(section, dict) or not is_size(section.get("vocab_size")):
        return config
    from lorakit.data.template_tokens import count_tokens

    rows = section["vocab_size"]
    folder = find_model_folder(base, revision)
    tokens = (folder and count_tokens(folder)) or rows
    grown = {**section, "vocab_size": max(rows, tokens + len(add_tokens))}
    return grown if section is config else {**config, "text_config": grown}


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
        plain_attention=is_plain_attention(config),
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


def check_local_base(recipe: Recipe, complete: bool = True) -> None:
    """Refuse a base model whose files a run would refuse, where they are here: a file is missing (where `complete`),
    damaged or pickled, code is to be run, or the template reads no such variable."""
    model, path = recipe.model, Path(recipe.model.base)
    local = path if path.is_absolute() and path.is_dir() else None
    folder = local or (None if path.is_absolute() else hub_snapshot(model.base, model.revision))
    if model.template_variables or model.template_date != "auto":
        _check_template(model, folder)
    if folder and (is_named(model.chat_template) or model.add_tokens):
        from lorakit.data.added_tokens import check_added_tokens
        from lorakit.data.template_tokens import check_template_tokens, tokens_in

        if has_token := tokens_in(folder):
            check_added_tokens(model.add_tokens, model.base, has_token)
            if is_named(model.chat_template):
                has_any = lambda text: text in model.add_tokens or has_token(text)  # noqa: E731
                check_template_tokens(str(model.chat_template), model.base, has_any, added=model.add_tokens)
    if folder:
        check_base_files(folder, complete and folder == local)
    if local and complete and not has_tokenizer(local):
        raise BaseModelError(f"{local} has no tokenizer, such as tokenizer.json. Fetch the model again.")
    if path.is_absolute() and not local:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if not is_gguf:
            raise BaseModelError(f"{path}: no readable GGUF file: it does not begin as one does. Fetch it again.")
        if not find_spec("gguf"):
            raise BaseModelError(f"{path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.")


def _check_template(model: Model, folder: Path | None) -> None:
    """Refuse a variable or a day that the chat template here does not read."""
    from lorakit.data.template_source import (  # 70 ms of imports
        check_template_date,
        check_template_variables,
        read_templates,
        writes_date,
    )

    own = template_file(model.chat_template) if model.chat_template else None
    if model.template_variables:
        check_template_variables(folder, own, model.template_variables)
    if model.template_date != "auto" and (templates := read_templates(folder, own)):
        check_template_date(model.template_date, writes_date(templates))


def load_template(recipe: Recipe, base: Base, adds_tokens: bool = False) -> "ChatTemplate":
    """The tokenizer in the base's folder with the recipe's chat template, or its own. A `UserError` where it cannot be
    loaded, or the template does not read the recipe's variables or day. `adds_tokens`: whether the folder's tokenizer
    has those of `model.add_tokens` not yet."""
    # transformers, and torch with it
    from lorakit.data.added_tokens import add_tokens
    from lorakit.data.chat_template import ChatTemplate
    from lorakit.data.template_source import check_template_date, writes_date
    from lorakit.data.template_tokens import check_template_tokens, is_single_token
    from lorakit.model.tokenizer import load_tokenizer, quiet_libraries, stop_words

    quiet_libraries()
    tokenizer = load_tokenizer(base, recipe.model.chat_template)
    if adds_tokens:
        add_tokens(tokenizer, recipe.model.add_tokens, base.name)
    if is_named(recipe.model.chat_template):
        name, has_token = str(recipe.model.chat_template), partial(is_single_token, tokenizer)
        check_template_tokens(name, base.name, has_token, bool(tokenizer.eos_token), recipe.model.add_tokens)
    given, writes = recipe.model.template_date, writes_date(tokenizer.chat_template)
    check_template_date(given, writes)
    template = ChatTemplate(
        tokenizer,
        recipe.data.train_on,
        recipe.data.system,
        stop_words(base, tokenizer),
        recipe.model.template_variables,
        (date.today().isoformat() if given == "auto" else given) if writes else None,
    )
    template.check_variables()
    return template


def find_template(recipe: Recipe) -> "ChatTemplate | None":
    """`load_template` where the tokenizer is on this machine, whether the weights are or not; else None."""
    folder = find_model_folder(recipe.model.base, recipe.model.revision)
    if folder is None or not has_tokenizer(folder):
        return None
    return load_template(recipe, Base(recipe.model.base, folder, "on this machine"), bool(recipe.model.add_tokens))


def describe_missing_files(recipe: Recipe) -> str | None:
    """What of the base's files a run would miss, of a base that `check_local_base` takes; None where nothing is."""
    try:
        check_local_base(recipe)
    except UserError as error:
        return f"{error} It is planned all the same; a run would be refused"
    return None


def refuse_by_config(recipe: Recipe, facts: ModelInfo | None) -> None:
    """Refuse rows or answers of more tokens than the model has positions for, layers that it does not have, and a merge
    into weights whose quantization cannot be undone."""
    merges = recipe.output.merged or any(parse_target(word).is_merged for word in recipe.output.export)
    if merges and not trains_all(recipe.adapter) and facts:
        refuse_irreversible(facts.stored, recipe.model.base)
    layers = recipe.adapter.layers
    if facts and facts.layers and layers != "all" and not isinstance(layers, Spectrum):
        last = max(map(int, re.findall(r"\d+", str(layers))))
        if last >= facts.layers:
            reason = f"{last} is not a layer of the model: this model has layers 0 to {facts.layers - 1}"
            raise UserError(f"adapter.layers: {reason}. Write a lower number.")
    positions = facts.positions if facts else None
    if positions is None or not positions.hard:
        return
    why = f"{positions.limit:,} positions ({positions.key}), each with an embedding of its own, and none for more"
    longest, answer = recipe.data.max_length, recipe.evaluate.max_new_tokens
    if longest > positions.limit:
        raise UserError(
            f"data.max_length: rows of {longest:,} tokens are allowed, but {recipe.model.base} has {why}. "
            f"Write max_length: {positions.limit} or less."
        )
    if answer > positions.limit:
        raise UserError(
            f"evaluate.max_new_tokens: answers of {answer:,} tokens are asked for, but {recipe.model.base} has {why}. "
            f"Write max_new_tokens: {max(1, positions.limit // 2)}, which leaves room for the prompt."
        )


def beyond_training(recipe: Recipe, facts: ModelInfo | None, longest: int | None = None) -> str:
    """A warning where rows are longer than what the model was trained on; empty where none is due. `longest`: the
    longest row in tokens; None where no row has been read, which leaves `data.max_length`."""
    positions = facts.positions if facts else None
    length = recipe.data.max_length if longest is None else min(longest, recipe.data.max_length)
    if positions is None or positions.hard or length <= positions.limit:
        return ""
    rows = f"rows may have {length:,} tokens" if longest is None else f"the longest row has {length:,} tokens"
    return f"data.max_length: {rows}, {unseen(positions)}. Write max_length: {positions.limit}, or choose another model"


def unseen(positions: Positions) -> str:
    """A clause on what later positions mean for a model without a limit."""
    return (
        f"but the model was trained on {positions.limit:,} positions ({positions.key}): later ones are computed, but "
        "it has never seen any, and mostly predicts badly there"
    )
