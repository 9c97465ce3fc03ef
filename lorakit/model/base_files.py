"""Whether the files of a base model can be trained on: complete, undamaged, and nothing of them is run or unpickled.

Read without torch, and of weights only the headers, so that `lorakit check` can do it too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.atomic_io import lies_inside, refuse_pipes
from lorakit.errors import UserError
from lorakit.model.config_values import read_json
from lorakit.model.safetensors_header import INDEX, SINGLE, read_header, weight_files

_KERNELS = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Ends of files that are copied into results; weights are not, and may be links.
_COPIED = (".json", ".jinja", ".model", ".tiktoken", "vocab.txt", "merges.txt")
# A model with a tokenizer has at least one of these.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


def check_base_files(folder: Path, complete: bool = True) -> None:
    """Refuse a folder that transformers cannot load, or not without running code or unpickling anything.

    `complete`: whether a missing file is an error. In the hub's cache it is not, where a run fetches it.
    """
    try:
        refuse_pipes(folder)
        refuse_code(folder)
        for path in sorted(folder.iterdir()):
            if path.name.endswith(_COPIED) and path.is_symlink() and not lies_inside(path, folder):
                reason = f"{path} is a link to {path.resolve()}, outside of the folder"
                remedy = "Put the file itself there (cp -L): it is copied into adapters and merged models."
                raise UserError(f"{reason}. {remedy}")
        _check_configs(folder, complete)
        _check_weights(folder, complete)
        _check_tokenizer(folder / "tokenizer.json")
    except UserError as error:
        raise UserError(f"model.base: {error}") from error


def refuse_code(folder: Path, where: str = "") -> None:
    """Refuse a folder whose configuration names Python code to run, its own or a kernel of the hub, in whichever file.

    `where` begins the message, such as a key of the recipe.
    """
    for file in sorted(folder.glob("*config.json")):
        try:
            config = read_json(file)
        except UserError:
            continue  # transformers cannot read it either; what a run reads is checked apart
        for key, names in _code_in(config):
            reason = f"brings its own Python code ({names}, in {key} of {file.name}), which lorakit does not run"
            remedy = f"Give a model without, or, where transformers has a class for it, a copy without {key}."
            raise UserError(f"{where}{folder} {reason}. {remedy}")


def _code_in(value: Any) -> Iterator[tuple[str, str]]:
    """Each key that names code, at any depth, and the names.

    `auto_map` maps classes to code, lists code in an older form, or both. An attention or expert implementation named
    as a repository of the hub is code that transformers fetches and runs.
    """
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                yield "auto_map", ", ".join(_texts_in(value["auto_map"])) or "an empty name"
            for key in value.keys() & _KERNELS:
                if kernels := [text for text in _texts_in(value[key]) if "/" in text]:
                    yield key, ", ".join(kernels)
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts_in(part)]
    return [str(value)[:80]] if value else []


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has some file that a tokenizer is read from."""
    return any(next(folder.glob(name), None) for name in _TOKENIZERS)


def refuse_missing_tokenizer(folder: Path) -> None:
    """Refuse a folder without any file that a tokenizer is read from."""
    if not has_tokenizer(folder):
        raise UserError(f"model.base: {folder} has no tokenizer ({', '.join(_TOKENIZERS)}). Fetch the model again.")


def _check_configs(folder: Path, complete: bool) -> None:
    file, has_adapter = folder / "config.json", (folder / "adapter_config.json").is_file()
    if not file.is_file():
        if has_adapter:
            raise UserError(f"{folder} holds an adapter. Write it as adapter.from, and its base as model.base.")
        if complete:
            is_run = (folder / "manifest.json").is_file()
            remedy = " It is a run: write it as adapter.from, or its merged/ as model.base." if is_run else ""
            raise UserError(f"{folder} has no config.json, so it is not a model folder.{remedy}")
        return
    config = read_json(file)
    for path in (file, folder / "tokenizer_config.json"):
        if read_json(path).get("auto_map", {}) is None:
            raise UserError(f"{path} says auto_map: null, on which transformers fails. Remove the key.")
    read_json(folder / "generation_config.json")
    if "model_type" not in config:
        raise UserError(f"{file} names no model_type.")
    other = config.get("transformers_weights")
    if other not in (None, SINGLE, INDEX):
        reason = f"names other weights than {SINGLE} (transformers_weights: {other!r})"
        raise UserError(f"{file} {reason}, which lorakit does not look for. Rename the file, and remove the key.")
    if has_adapter:
        reason = "has adapter_config.json: transformers would put that adapter into the model"
        raise UserError(f"{folder} {reason}. Merge it into the model first, or give a folder without it.")


def _check_weights(folder: Path, complete: bool) -> None:
    if any(folder.glob("*.safetensors")):
        for file in weight_files(folder, complete):
            read_header(file)
        return
    pickled = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED))
    if pickled or complete:
        remedy = f" It has {pickled}, which would run code when read: convert it to safetensors." if pickled else ""
        raise UserError(f"{folder} has no .safetensors file.{remedy}")


def _check_tokenizer(path: Path) -> None:
    """Whether tokenizer.json begins and ends as a mapping does; reading all of it takes too long here."""
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(4096).strip()
            file.seek(max(0, path.stat().st_size - 4096))
            end = file.read().strip()
        if not (begin.startswith(b"{") and end.endswith(b"}")):
            raise UserError(f"{path} is damaged: it is not a complete JSON mapping. Fetch the model again.")
