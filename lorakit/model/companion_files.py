"""What belongs to a model besides its weights, taken from the base's own files: configuration, tokenizer, licence.

transformers writes a configuration in its newest form, which other releases silently misread: 4.57 finds no
`rope_theta` in it and takes 10,000. So the base's own is copied, and only what differs is changed.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import lies_inside
from lorakit.model.state_dict import untied_config
from lorakit.model.tokenizer_files import read_json, write_json, write_tokenizer

# What a processor of images, sounds or videos is read from, and the terms that the model is given under.
_COPIED = ("*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def write_trained_model(model: Any, base: Path, tokenizer: Any, stop_ids: list[int], folder: Path) -> None:
    """Write a whole model in memory that was made of the base's files, with its companion files."""
    model.save_pretrained(folder)
    written = read_json(folder / "config.json")
    # Of some bases that see images too, only the language model is in memory, which has another configuration.
    is_other = written["model_type"] != read_json(base / "config.json")["model_type"]
    config = with_older_keys(written | {"dtype": _word(model.dtype)}) if is_other else None
    write_companion_files(base, tokenizer, stop_ids, None, folder, config=config)


def write_companion_files(
    base: Path,
    tokenizer: Any,
    stop_ids: list[int],
    dtype: torch.dtype | None,
    folder: Path,
    untied: bool = False,
    config: dict[str, Any] | None = None,
) -> None:
    """Write the configuration of a model with the base's weights, its stop tokens, tokenizer, processors and licence.

    Args:
        base: the folder of the base model.
        dtype: of all weights, where it is not the base's.
        untied: whether the weights that the base ties are two in the files.
        config: the content of config.json, where it is not the base's.
    """
    config = config or read_json(base / "config.json")
    config = untied_config(config) if untied else config
    for section in (config, config.get("text_config") or {}):
        section.pop("quantization_config", None)
        if dtype is not None:  # under the name that the base's release has for it
            keys = section.keys() & {"dtype", "torch_dtype"} or {"dtype"}
            section |= dict.fromkeys(keys, _word(dtype))
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


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
