"""What belongs to a model besides its weights, taken from the base's own files: configuration, tokenizer, licence.

transformers writes a configuration in its newest form, which other releases misread without a word: 4.57 finds no
`rope_theta` in it and takes 10,000. So the base's own is taken over, and only what differs is changed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import lies_inside
from lorakit.model.state_dict import untied_config
from lorakit.model.tokenizer_files import write_tokenizer

# What a processor of images, sounds or videos is read from, and under which terms the model is given.
_TAKEN_OVER = ("*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def write_trained_model(model: Any, base: Path, tokenizer: Any, stop_ids: list[int], folder: Path) -> None:
    """Write a whole model in memory that was made of the base's files, with what belongs to it besides.

    Of some bases that see images too only the language model is in memory, which has a configuration of its own.
    """
    model.save_pretrained(folder)
    written, own = (json.loads((place / "config.json").read_text(encoding="utf-8")) for place in (folder, base))
    if written["model_type"] == own["model_type"]:
        config = own
    else:
        config = with_older_keys(written | {"dtype": str(model.dtype).removeprefix("torch.")})
    _write_beside(config, base, tokenizer, stop_ids, None, folder)


def write_companion_files(
    base: Path, tokenizer: Any, stop_ids: list[int], dtype: torch.dtype | None, folder: Path, untied: bool = False
) -> None:
    """Write the configuration of a model with the base's weights, where it stops, its tokenizer, processors, licence.

    Args:
        base: the folder of the base model, of which everything but the weights is taken.
        dtype: of all weights, where it is another than the base's.
        untied: whether the weights that the base ties are two in the files.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = untied_config(config) if untied else config
    _write_beside(config, base, tokenizer, stop_ids, dtype, folder)


def _write_beside(
    config: dict[str, Any], base: Path, tokenizer: Any, stop_ids: list[int], dtype: torch.dtype | None, folder: Path
) -> None:
    for section in (config, config.get("text_config") or {}):
        section.pop("quantization_config", None)
        if dtype is not None:  # under the name that the base's release has for it
            named = section.keys() & {"dtype", "torch_dtype"} or {"dtype"}
            section |= dict.fromkeys(named, str(dtype).removeprefix("torch."))
    generation = base / "generation_config.json"
    if generation.is_file():
        answers = json.loads(generation.read_text(encoding="utf-8"))
    else:
        answers = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    answers["eos_token_id"] = stop_ids
    for name, facts in (("config.json", config), ("generation_config.json", answers)):
        _write(folder / name, facts)
    for file in (path for name in _TAKEN_OVER for path in base.glob(name)):
        if file.is_file() and lies_inside(file, base):
            shutil.copyfile(file, folder / file.name)
    write_tokenizer(base, tokenizer, folder)


def add_older_keys(folder: Path) -> None:
    """Write into a config.json of transformers 5 the keys besides by which older programs know the same."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write(folder / "config.json", with_older_keys(config))


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5 with the keys besides by which older programs know the same."""
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        others = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if others.get("rope_type", "default") == "default" else others
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    return config


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
