"""What belongs to a model besides its weights, taken from the base's own files: configuration, tokenizer, licence.

transformers writes configurations and tokenizers in its newest form, which other releases and programs misread: 4.57
finds no `rope_theta` and takes 10,000, others miss `tokenizer.model`. So the base's files are copied, and only what
differs is changed.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorakit.atomic_io import lies_inside
from lorakit.model.config_values import read_json
from lorakit.recipe.problem import quote

# What a processor of images, sounds or videos is read from, and the terms that the model is given under.
_COPIED = ("*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_CONFIG, _TEMPLATE, _NAMED_TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
_PROCESSOR_TEMPLATE = "chat_template.json"  # transformers' older place for the template of a processor
_NAMES = (
    *(_CONFIG, _TEMPLATE, _PROCESSOR_TEMPLATE, f"{_NAMED_TEMPLATES}/*.jinja"),
    *("tokenizer.json", "tokenizer.*.json"),  # for versions of the library, see `fast_tokenizer_files`
    *("tokenizer.model", "tokenizer.model.*", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "*.tiktoken", "tiktoken.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
)
_FILE_CLASS = "PreTrainedTokenizerFast"  # which transformers builds from tokenizer.json alone
# Of names that not every release of transformers knows, the one for the same thing that all do.
_KNOWN_TO_ALL = {"TokenizersBackend": _FILE_CLASS}
_SHOWN_TOKENS = 8


def write_trained_model(
    model: Any, weights: dict[str, Any], base: Path, tokenizer: Any, stop_ids: list[int], folder: Path
) -> None:
    """Write a whole model in memory that was made of the base's files, with its companion files. `weights`: its state
    dict."""
    model.save_pretrained(folder, state_dict=weights)
    config, written = read_json(base / "config.json"), read_json(folder / "config.json")
    # Of some bases that see images too, only the language model is in memory, which has another configuration.
    if written["model_type"] != config["model_type"]:
        config = with_older_keys(written | {"dtype": str(model.dtype).removeprefix("torch.")})
    write_companion_files(base, tokenizer, stop_ids, config, folder)


def write_companion_files(
    base: Path, tokenizer: Any, stop_ids: list[int], config: dict[str, Any], folder: Path, dtype: str | None = None
) -> None:
    """Write what a model has besides its weights: `config` as config.json, the stop tokens, and the base's tokenizer,
    processors and licence. `dtype` is the type of all weights, where it is not the base's."""
    for section in (config, config.get("text_config") or {}):
        section.pop("quantization_config", None)
        if dtype is not None:  # under the name that the base's release has for it
            keys = section.keys() & {"dtype", "torch_dtype"} or {"dtype"}
            section |= dict.fromkeys(keys, dtype)
    write_json(folder / "config.json", config)
    settings = read_json(base / "generation_config.json") or {
        key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None
    }
    write_json(folder / "generation_config.json", settings | {"eos_token_id": stop_ids})
    for file in (path for pattern in _COPIED for path in base.glob(pattern)):
        if file.is_file() and lies_inside(file, base):
            shutil.copyfile(file, folder / file.name)
    write_tokenizer(base, tokenizer, folder)


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5, with the keys added that older programs read instead."""
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        others = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if others.get("rope_type", "default") == "default" else others
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    return config


def write_tokenizer(base: Path, tokenizer: Any, folder: Path) -> None:
    """Write the files of the base's tokenizer into a folder, and what `tokenizer` has instead: a chat template that is
    not the base's, where each program looks for it, and its class, where only the base's config.json names it."""
    names = [*_NAMES, *(name for name in tokenizer.vocab_files_names.values() if name)]
    files = {file for name in names for file in base.glob(name) if file.is_file() and lies_inside(file, base)}
    for file in sorted(files):
        place = folder / file.relative_to(base)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
    written = _read_tokenizer(folder)
    if type(written) is not type(tokenizer):
        name = type(tokenizer).__name__
        write_json(folder / _CONFIG, read_json(folder / _CONFIG) | {"tokenizer_class": _KNOWN_TO_ALL.get(name, name)})
        written = _read_tokenizer(folder)
    template = tokenizer.chat_template
    if isinstance(template, str) and (written is None or written.chat_template != template):
        # transformers goes by the file, llama.cpp by the key. The base's other places for a template are removed, or
        # programs that look there would see another one.
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")
        write_json(folder / _CONFIG, read_json(folder / _CONFIG) | {"chat_template": template})
        shutil.rmtree(folder / _NAMED_TEMPLATES, ignore_errors=True)
        (folder / _PROCESSOR_TEMPLATE).unlink(missing_ok=True)
        processor = folder / "processor_config.json"
        if "chat_template" in read_json(processor):
            write_json(processor, read_json(processor) | {"chat_template": template})


def save_new_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that has no files, such as a GGUF file's, so that every release of transformers reads it."""
    tokenizer.save_pretrained(folder)
    config = read_json(folder / _CONFIG)
    name, extra = str(config.get("tokenizer_class")), config.pop("extra_special_tokens", None)
    config["tokenizer_class"] = _KNOWN_TO_ALL.get(name, name)
    if extra:  # transformers 4 takes a list under this name only, 5 under both
        config["additional_special_tokens"] = extra
    write_json(folder / _CONFIG, config)


def compare_with_file(base: Path, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """A warning where a tokenizer gives other tokens for the rows' texts than tokenizer.json in `base`.

    For many classes (Llama's, Gemma's, Qwen 2's, GPT-2's) transformers 5 takes vocabulary and merges from that file,
    and normalizer and pre-tokenizer from the class (`convert_to_native_format` in its
    tokenization_utils_tokenizers.py). Other programs take all of it from the file, transformers 4 among them.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or not (base / "tokenizer.json").is_file():
        return None
    by_file = PreTrainedTokenizerFast.from_pretrained(base, trust_remote_code=False)
    pairs = [tuple(one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, by_file)) for text in texts]
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    if not differing:
        return None
    ours, its = differing[0]
    first = next((at for at, (one, other) in enumerate(zip(ours, its, strict=False)) if one != other), len(its) - 1)
    shown = slice(max(first - 1, 0), max(first - 1, 0) + _SHOWN_TOKENS)
    tokens = (one.convert_ids_to_tokens(ids[shown]) for one, ids in ((tokenizer, ours), (by_file, its)))
    words, others = (" ".join(quote(str(word)) for word in of_one) for of_one in tokens)
    builds = f"transformers {transformers.__version__} builds another tokenizer ({type(tokenizer).__name__})"
    return (
        f"{builds} than tokenizer.json describes. {len(differing)} of {len(texts)} rows that were compared get other "
        f"tokens, the first {words} where the file gives {others}. The run is trained on those of transformers; "
        "programs that go by the file give the model others. Of most families, a copy of the base with "
        f'"tokenizer_class": "{_FILE_CLASS}" in {_CONFIG} gets those of the file.'
    )


def _read_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a configuration as transformers lays them out."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
