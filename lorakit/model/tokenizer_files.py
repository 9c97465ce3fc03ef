"""The files that a tokenizer is read from: those of the base, byte for byte, beside whatever is trained on it.

transformers writes a tokenizer in its own newest form: another class, other types of values, without the files that
other programs read (`tokenizer.model`). So the files are copied, and only what differs from the base is changed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lorakit.atomic_io import lies_inside

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_NAMED_TEMPLATES = "additional_chat_templates"
_PROCESSOR_TEMPLATE = "chat_template.json"  # transformers' older place for the template of a processor
_NAMES = (
    CONFIG,
    TEMPLATE,
    _PROCESSOR_TEMPLATE,
    "tokenizer.json",
    "tokenizer.*.json",  # for versions of the library, see `fast_tokenizer_files`
    "tokenizer.model",
    "tokenizer.model.*",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    f"{_NAMED_TEMPLATES}/*.jinja",
)
# Of names that not every release of transformers knows, the one for the same thing that all do.
_KNOWN_TO_ALL = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# What loading a tokenizer raises where a folder does not say enough of it.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)


def write_tokenizer(base: Path, tokenizer: Any, folder: Path) -> None:
    """Write the files of the base's tokenizer into a folder, with what `tokenizer` has instead.

    A chat template that is not the base's own is written where each program looks for it. Where the base's config.json
    says of which class the tokenizer is, and the folder has none (an adapter's), its class is written too.

    Args:
        base: the folder that the tokenizer was loaded from.
    """
    for file in tokenizer_files(base, tokenizer):
        place = folder / file.relative_to(base)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
    read = read_tokenizer(folder)
    if type(read) is not type(tokenizer):
        name = type(tokenizer).__name__
        set_keys(folder / CONFIG, tokenizer_class=_KNOWN_TO_ALL.get(name, name))
        read = read_tokenizer(folder)
    template = tokenizer.chat_template
    if isinstance(template, str) and (read is None or read.chat_template != template):
        _write_template(folder, template)


def save_new_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that comes from no files of its own, such as a GGUF file's, so that every release reads it."""
    tokenizer.save_pretrained(folder)
    config = _json(folder / CONFIG)
    name, extra = str(config.get("tokenizer_class")), config.pop("extra_special_tokens", None)
    config["tokenizer_class"] = _KNOWN_TO_ALL.get(name, name)
    if extra:  # transformers 4 takes a list under this name only, 5 under both
        config["additional_special_tokens"] = extra
    _write_json(folder / CONFIG, config)


def tokenizer_files(base: Path, tokenizer: Any) -> list[Path]:
    """The files in a model's folder that a tokenizer is read from, by any program: those of its class and the usual."""
    names = [*_NAMES, *(name for name in tokenizer.vocab_files_names.values() if name)]
    found = {file for name in names for file in base.glob(name) if file.is_file()}
    return sorted(file for file in found if lies_inside(file, base))


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; None where the folder does not say enough to load it."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except _UNREADABLE:
        return None


def _write_template(folder: Path, template: str) -> None:
    """Write a chat template to both places of a tokenizer: transformers goes by the file, llama.cpp by the key.

    The base's other places for a template are taken away, or a program that looks there would see another one.
    """
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    set_keys(folder / CONFIG, chat_template=template)
    shutil.rmtree(folder / _NAMED_TEMPLATES, ignore_errors=True)
    (folder / _PROCESSOR_TEMPLATE).unlink(missing_ok=True)
    processor = folder / "processor_config.json"
    if "chat_template" in _json(processor):
        set_keys(processor, chat_template=template)


def set_keys(path: Path, **values: str) -> None:
    """Change keys of a JSON file and keep the others, in their order."""
    _write_json(path, _json(path) | values)


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
