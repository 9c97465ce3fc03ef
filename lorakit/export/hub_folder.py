"""The files of an export for the hub: copied without what lies beside them, and checked."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lorakit.amounts import counted
from lorakit.atomic_io import files_in, lies_inside, sha256_of
from lorakit.errors import UserError
from lorakit.export.hub_card import CardSubject
from lorakit.export.private_text import find_paths, find_secrets
from lorakit.export.source import Check, ExportSource
from lorakit.model.base_files import INDEX, read_header, weight_files
from lorakit.model.companion_files import write_json, write_tokenizer
from lorakit.model.config_values import read_json
from lorakit.run_dir import EXPORT, MERGED

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors")
# Of a model's folder what belongs to the model, whatever else lies there.
_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# Where transformers notes from where it loaded a model or a tokenizer.
_NOTED = ("_name_or_path", "name_or_path")


def copy_adapter(source: ExportSource, folder: Path) -> None:
    """The adapter's two files, and the tokenizer that it was trained with."""
    assert source.adapter is not None
    for name in _ADAPTER:
        if not (source.adapter / name).is_file():
            raise UserError(f"{source.adapter}: has no {name}, so there is no adapter to export.")
        shutil.copyfile(source.adapter / name, folder / name)
    has_tokenizer = (source.adapter / "tokenizer_config.json").is_file()
    write_tokenizer(source.adapter if has_tokenizer else source.base.folder, source.tokenizer, folder)


def copy_model(model: Path, folder: Path, copy: Callable[[Path, Path], object] = shutil.copyfile) -> None:
    """Copy what belongs to a model: weights, configuration, tokenizer, processors and terms."""
    weights = {file.name for file in weight_files(model)}
    for name in files_in(model):
        path, ours = Path(name), name in (MERGED, EXPORT) or (name == INDEX and len(weights) == 1)
        inside = len(path.parts) == 1 or path.parts[0] == "additional_chat_templates"
        belongs = name in weights or path.suffix in _SUFFIXES or name.startswith(_TERMS)
        if inside and belongs and not ours and not name.startswith(".") and lies_inside(model / name, model):
            (folder / name).parent.mkdir(exist_ok=True)
            copy(model / name, folder / name)


def remove_local_names(subject: CardSubject, folder: Path, adapter: dict[str, Any]) -> None:
    """Take out where the files were loaded from on this machine; the base's id on the hub stays, or is put in."""
    if adapter:
        named = {"base_model_name_or_path": subject.base_id}
        if subject.base_id is None:
            named["revision"] = None
        adapter |= named
        write_json(folder / ADAPTER_CONFIG, adapter)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        config = read_json(folder / name)
        if noted := [key for key in _NOTED if key in config]:
            write_json(folder / name, {key: value for key, value in config.items() if key not in noted})


def check_weights(subject: CardSubject, folder: Path) -> Check:
    """The files of weights against those that were trained, or merged and proved, and their headers."""
    source = subject.source
    origin = source.adapter if subject.weights == "adapter" else source.merged_model
    assert origin is not None
    names = [name for name in files_in(folder) if name.endswith(".safetensors")]
    tensors = sum(len(read_header(folder / name)[0]) for name in names)
    same = all(sha256_of(folder / name) == sha256_of(origin / name) for name in names)
    detail = f"{counted(tensors, 'tensor')} in {', '.join(names)}"
    return Check("weights", same, detail if same else f"{', '.join(names)}: are not what was trained")


def check_tokenizer(source: ExportSource, folder: Path) -> Check:
    """The tokenizer, loaded from the export, against that of the training on rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = source.texts

    def encode(one: Any) -> list[Any]:
        return [one(text, add_special_tokens=False)["input_ids"] for text in texts]

    same = sum(ours == its for ours, its in zip(encode(source.tokenizer), encode(tokenizer), strict=True))
    has_template = tokenizer.chat_template == source.tokenizer.chat_template
    detail = f"{same} of {len(texts)} rows become the tokens of the training"
    detail += "" if has_template else "; its chat template is another one"
    return Check("tokenizer", same == len(texts) and has_template, detail)


def check_base(subject: CardSubject) -> Check:
    """Whether the card can name the base by an id that the hub knows."""
    if subject.base_id:
        return Check("base model", True, f"{subject.base_id}, by its id on the hub")
    files = "base_model in README.md"
    if subject.weights == "adapter":
        files += " and base_model_name_or_path in adapter_config.json"
    detail = (
        f"{subject.shown_base} is a folder of this machine and has no id on the hub, so the card names none. Write "
    )
    detail += f"{files}, or export with --base ORG/NAME where the hub has these weights"
    return Check("base model", False, detail, fatal=False)


def check_private(subject: CardSubject, folder: Path) -> Check:
    """Whether any file holds a token, a key or a path of this machine."""
    source, names = subject.source, files_in(folder)
    secrets = find_secrets(folder, names)
    local = (source.folder, source.base.source, Path.cwd())
    paths = [f"{name}: a path of this machine" for name in find_paths(folder, names, *local)]
    if not secrets and not paths:
        return Check("private texts", True, "no token, key or path of this machine")
    return Check("private texts", False, "; ".join([*secrets, *paths]), fatal=bool(secrets))
