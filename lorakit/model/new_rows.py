"""A base model with new rows in its embeddings: those of `model.add_tokens`, or those that an adapter brings.

The base is written once more, into the cache: configuration, tokenizer, and embeddings with these rows; the other
weights are links to the model's own files. What stands on a base, from training to a server's files, reads this folder
as it reads any other. A new row begins as the mean of the rows of all tokens that the vocabulary had, in each of both
ends where these are two weights (transformers' `resize_token_embeddings` begins there too, with noise). Many models
have more rows than tokens: a token then takes one of these, and nothing grows.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer

from lorakit.atomic_io import atomic_dir, cache_folder
from lorakit.checksums import find_damage, write_checksums
from lorakit.errors import BaseModelError, UserError
from lorakit.model.base_files import INDEX, StoredTensor, list_tensors, read_header, weight_files
from lorakit.model.companion_files import save_new_tokenizer, write_companion_files, write_json, write_tokenizer
from lorakit.model.config_values import is_size, read_json
from lorakit.model.resolve import Base, NewRows
from lorakit.model.safetensors_io import open_writer, read_tensor
from lorakit.model.spec_from_meta import meta_model
from lorakit.model.state_dict import paths_of_tensors
from lorakit.model.tokenizer import load_tokenizer, stop_token_ids
from lorakit.recipe.init_adapter import read_adapter_config

_VERSION = 1
"""Raise it when folders that were written before are to be written anew."""
_AT_ONCE = 1 << 16  # rows that a mean is taken of at a time
_BY_PEFT = "Merge it with PEFT, on the model that it was trained on."


class _CannotGrow(Exception):
    """Why a base gets no new rows."""


def with_new_tokens(base: Base, tokenizer: Any, tokens: Mapping[int, str]) -> Base:
    """The base with these tokens, which `tokenizer` has besides those of the base's own. UserError where the family's
    vocabulary cannot grow, or its tokenizer's files cannot hold them."""
    plain = load_tokenizer(base, None)
    added = {number: _entry(tokenizer, number) for number in tokens}
    model = meta_model(base.folder)
    rows = _new_rows(model, tokens)
    facts = [str(base.folder.resolve()), base.sha256(), rows, sorted(added.items())]

    def write(draft: Path, config: dict[str, Any]) -> None:
        write_companion_files(base.folder, plain, stop_token_ids(base, plain), copy.deepcopy(config), draft)
        _add_to_files(draft, added)
        if not _reads(draft, tokens):
            save_new_tokenizer(_with_template(tokenizer, plain.chat_template), draft)
        if not _reads(draft, tokens):
            raise _CannotGrow(f"its tokenizer ({type(tokenizer).__name__}) has no files that could hold them")

    known = [number for number in plain.get_vocab().values() if number not in tokens]
    try:
        return _with_rows(base, model, rows, known, facts, write)
    except _CannotGrow as error:
        reason = f"{base.name} cannot get tokens: {error}"
        raise BaseModelError(f"model.add_tokens: {reason}. Leave it out, or choose another base.") from error


def with_rows_of(adapter: Path, base: Base) -> Base:
    """The base with as many rows as an adapter in PEFT's format was trained with, which may be others' work. UserError
    where the embeddings would grow by a row that the adapter does not have: its training had numbers there that nobody
    knows."""
    if not (_token_indices(adapter) or any(".lora_" not in name for name in _tensors(adapter))):
        return base
    model = meta_model(base.folder)
    own, by_end = _rows_of(model), _rows_in(adapter, model)
    total = max((max(rows) + 1 for rows in by_end.values() if rows), default=0)
    if total <= own:
        return base
    for path, some in by_end.items():
        if gap := next((row for row in range(own, total) if row not in some), None):
            reason = f"was trained on embeddings of {total:,} rows or more, and has no row {gap} of {path}"
            raise UserError(f"{adapter}: {reason}, nor has {base.name}, of {own:,} rows. {_BY_PEFT}")
    folder = adapter if (adapter / "tokenizer_config.json").is_file() else base.folder
    tokenizer = load_tokenizer(Base(str(adapter), folder, base.origin), None)
    rows, vocabulary = list(range(own, total)), tokenizer.get_vocab()
    facts = [str(base.folder.resolve()), base.sha256(), rows, str(folder.resolve()), sorted(vocabulary.items())]

    def write(draft: Path, config: dict[str, Any]) -> None:
        write_companion_files(base.folder, tokenizer, stop_token_ids(base, tokenizer), copy.deepcopy(config), draft)
        write_tokenizer(folder, tokenizer, draft)

    try:
        return _with_rows(base, model, rows, [row for row in vocabulary.values() if row < own], facts, write)
    except _CannotGrow as error:
        reason = f"was trained on embeddings of {total:,} rows, and those of {base.name} cannot grow: {error}"
        raise UserError(f"{adapter}: {reason}. {_BY_PEFT}") from error


def grown_to(base: Base) -> int | None:
    """How many rows the embeddings of a base with new tokens have, where those of the model itself are fewer."""
    if base.new is None:
        return None
    rows, own = (_rows_of(meta_model(folder)) for folder in (base.folder, base.source))
    return rows if rows > own else None


def _rows_in(adapter: Path, model: Any) -> dict[str, set[int]]:
    """Which rows an adapter brings of each of the model's weights that have a row for each token."""
    indices, tensors, rows = _token_indices(adapter), _tensors(adapter), {}
    inputs = next(iter(_ends(model))).removesuffix(".weight")
    named = indices if isinstance(indices, dict) else {inputs: indices}
    for path, is_own in _ends(model).items():
        name = path.removesuffix(".weight")
        of_end = next((some for key, some in named.items() if name.endswith(key)), [])
        # What PEFT saves of resized embeddings besides stands below their own name, such as X.base_layer.weight.
        counts = [one.shape[0] for file, one in tensors.items() if _is_whole(file, name)]
        if is_own:
            rows[path] = {*of_end, *range(max(counts, default=0))}
    return rows


def _is_whole(file: str, name: str) -> bool:
    """Whether a tensor of an adapter's file is a whole weight of a module of this path."""
    return file.startswith(f"base_model.model.{name}.") and file.endswith(".weight") and ".lora_" not in file


def _token_indices(adapter: Path) -> list[int] | dict[str, list[int]]:
    return read_adapter_config(adapter).get("trainable_token_indices") or []


def _tensors(adapter: Path) -> dict[str, StoredTensor]:
    return read_header(adapter / "adapter_model.safetensors")[0]


def _rows_of(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _new_rows(model: Any, tokens: Mapping[int, str]) -> list[int]:
    """The rows of the tokens, and all by which the embeddings grow: numbers that the tokenizer gave to tokens which the
    model has no row for are among these."""
    return sorted({*tokens, *range(_rows_of(model), max(tokens) + 1)})


def _with_rows(base: Base, model: Any, rows: list[int], known: list[int], facts: Any, write: Any) -> Base:
    """The base with its folder in the cache, made where it is not there. `known`: the rows that new ones are the mean
    of; `write` puts all but the weights and the configuration into a folder."""
    digest = hashlib.sha256(json.dumps([_VERSION, facts], sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "new-rows" / digest[:32]
    damage = find_damage(folder)
    if damage or not folder.exists():
        total = max(_rows_of(model), rows[-1] + 1)
        config = _grown_config(base, model, total)
        with atomic_dir(folder, first_wins=not damage) as draft:
            write(draft, config)
            write_json(draft / "config.json", config)
            _write_weights(base, model, total, rows, known, draft)
            write_checksums(draft)
    return Base(base.name, folder, base.origin, NewRows(tuple(rows), base.source))


def _grown_config(base: Base, model: Any, rows: int) -> dict[str, Any]:
    """The base's config.json for so many rows. _CannotGrow where more of the model than its embeddings would."""
    config = read_json(base.folder / "config.json")
    sections = [config, config.get("text_config")]
    holders = [one for one in sections if isinstance(one, dict) and is_size(one.get("vocab_size"))] or [config]
    for holder in holders:
        holder["vocab_size"] = rows
    with TemporaryDirectory() as folder:  # transformers reads some values of the file otherwise than of a mapping
        write_json(Path(folder) / "config.json", config)
        grown = meta_model(Path(folder))
    shapes = [{path: tuple(value.shape) for path, value in one.state_dict().items()} for one in (model, grown)]
    changed = {path for path in shapes[0] if shapes[0][path] != shapes[1].get(path)}
    # Gemma 3n and its heirs look tokens up a second time, in a weight that has a size of its own.
    second = getattr(grown.config.get_text_config(), "vocab_size_per_layer_input", None) or rows
    if _rows_of(grown) != rows or changed - {*_ends(model)} or second < rows:
        which = min(changed - {*_ends(model)}, default="its embeddings" if second >= rows else "embed_tokens_per_layer")
        raise _CannotGrow(f"{which} would not fit {rows:,} of them")
    return config


def _ends(model: Any) -> dict[str, bool]:
    """The paths of the weights with a row for each token, and whether each is a weight of its own."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    ends = {f"{paths[id(inputs)]}.weight": True}
    if outputs is not None:
        ends[f"{paths[id(outputs)]}.weight"] = outputs.weight is not inputs.weight
    return ends


def _write_weights(base: Base, model: Any, total: int, rows: list[int], known: list[int], draft: Path) -> None:
    """The weights as shards: links to the base's own files, and a last one, of which the readers of an index take what
    earlier ones have too (transformers and lorakit go through the shards in the order of their names)."""
    tensors, ends = list_tensors(base.folder), _ends(model)
    by_name = {name: path for name, path, pattern in paths_of_tensors(model, tensors) if pattern is None}
    own = {name: tensors[name] for name, path in by_name.items() if path in ends}
    for path, is_own in ends.items():
        if is_own and path not in (by_name[name] for name in own):
            raise _CannotGrow(f"its files have no plain {path}")
    if wrong := next((name for name, stored in own.items() if not stored.is_plain), None):
        raise _CannotGrow(f"its {wrong} is stored as {own[wrong].dtype}")
    files = weight_files(base.folder)
    names = [f"model-{number:05}-of-{len(files) + 1:05}.safetensors" for number in range(1, len(files) + 2)]
    for file, name in zip(files, names, strict=False):
        (draft / name).symlink_to(file.resolve())
    last = draft / names[-1]
    grown = {name: StoredTensor(last, one.dtype, (total, *one.shape[1:]), 0) for name, one in own.items()}
    with open_writer(last, grown, {}) as writer:
        for name, stored in own.items():
            writer.put(name, _with_mean(read_tensor(stored), total, rows, known))
    places = dict(zip(files, names, strict=False))
    weight_map = {name: names[-1] if name in own else places[stored.file] for name, stored in tensors.items()}
    size = sum(stored.size for stored in (tensors | grown).values())
    write_json(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _with_mean(table: torch.Tensor, total: int, rows: list[int], known: list[int]) -> torch.Tensor:
    """A weight (rows, width) with `total` rows, of which `rows` are the mean of those that tokens have."""
    has_token = torch.zeros(len(table), dtype=torch.bool)
    has_token[[number for number in known if number < len(table)]] = True
    parts = zip(table.split(_AT_ONCE), has_token.split(_AT_ONCE), strict=True)
    mean = sum(part[here].sum(0, dtype=torch.float64) for part, here in parts) / has_token.sum()
    grown = table.new_empty((total, *table.shape[1:]))
    grown[: len(table)] = table
    grown[rows] = mean.to(table.dtype)
    return grown


def _entry(tokenizer: Any, number: int) -> dict[str, Any]:
    token = tokenizer.added_tokens_decoder[number]
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def _add_to_files(folder: Path, added: Mapping[int, dict[str, Any]]) -> None:
    """Write tokens into the files of a tokenizer, each where programs of its kind look for them."""
    files = [*folder.glob("tokenizer.json"), *folder.glob("tokenizer.*.json")]
    for file in files:
        content = read_json(file)
        entries = [{"id": number, **entry} for number, entry in added.items()]
        content["added_tokens"] = sorted([*content.get("added_tokens", []), *entries], key=lambda one: one["id"])
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = read_json(folder / "tokenizer_config.json")
    if not files or "added_tokens_decoder" in config or any(folder.glob("*.model")):  # llama.cpp goes by the .model
        entries_by_id = {str(number): entry for number, entry in added.items()}
        config["added_tokens_decoder"] = {**(config.get("added_tokens_decoder") or {}), **entries_by_id}
        write_json(folder / "tokenizer_config.json", config)
    if (folder / "added_tokens.json").is_file():
        by_text = {entry["content"]: number for number, entry in added.items()}
        write_json(folder / "added_tokens.json", read_json(folder / "added_tokens.json") | by_text)


def _reads(folder: Path, tokens: Mapping[int, str]) -> bool:
    """Whether the tokenizer of a folder makes these tokens of their texts."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return all(
            tokenizer(text, add_special_tokens=False)["input_ids"] == [number] for number, text in tokens.items()
        )
    except Exception:  # the Rust tokenizers raise bare Exceptions
        return False


def _with_template(tokenizer: Any, template: Any) -> Any:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = template
    return plain
