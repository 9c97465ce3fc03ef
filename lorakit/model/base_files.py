"""Whether the files of a base model can be trained on: complete, undamaged, and nothing of them is run or unpickled.

Read without torch, and of weights only the headers, so that `lorakit check` can say it too.
"""

import json
from pathlib import Path
from typing import Any

from lorakit.atomic_io import lies_inside, refuse_pipes
from lorakit.errors import UserError
from lorakit.model.safetensors_header import INDEX, SINGLE, read_header, weight_files

_READ_BY_ALL = ("config.json", "tokenizer_config.json", "generation_config.json")
_ADAPTER = "adapter_config.json"
# An attention that is named as a repository of the hub is code of there, which transformers fetches and runs.
_KERNELS = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "Fetch the model again."
# Files that are copied into results; weights are not, and may be links.
_COPIED = (".json", ".jinja", ".model", ".tiktoken")
_COPIED_BY_NAME = ("vocab.txt", "merges.txt")
# Of these a model with a tokenizer has at least one.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


def check_base_files(folder: Path, complete: bool = True) -> None:
    """Refuse a folder that transformers cannot load, or not without running code or unpickling anything.

    Args:
        complete: whether a missing file is a fault. In the hub's cache it is not, where a run fetches it.

    Raises:
        UserError: it says of which file it is, and what to do.
    """
    try:
        refuse_pipes(folder)
    except UserError as error:
        raise UserError(f"model.base: {error}") from error
    refuse_code(folder, "model.base")
    try:
        _check_links(folder)
        _check_configs(folder, complete)
        _check_weights(folder, complete)
        _check_tokenizer(folder)
    except UserError as error:
        raise UserError(f"model.base: {error}") from error


def refuse_code(folder: Path, key: str) -> None:
    """Refuse a folder whose configuration names Python code to run, its own or a kernel of the hub, in whichever file.

    Args:
        key: what of the recipe names the folder.

    Raises:
        UserError: it names the file and the code.
    """
    for file in sorted(folder.glob("*config.json")):
        try:
            named = _code_in(_json(file))
        except UserError:
            continue  # transformers cannot read it either; what a run reads is checked apart
        if named is not None:
            where, code = named
            raise UserError(
                f"{key}: {folder} brings its own Python code ({code}, in {where} of {file.name}), which lorakit does "
                f"not run. Give a model without, or, where transformers has a class for it, a copy without {where}."
            )


def _code_in(values: Any) -> tuple[str, str] | None:
    """The key that names code, at any depth, and the code; None where there is none."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                return "auto_map", ", ".join(_texts(value["auto_map"])) or "an empty name"
            for key in value.keys() & _KERNELS:
                if kernels := [text for text in _texts(value[key]) if "/" in text]:
                    return key, ", ".join(kernels)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return None


def _texts(value: Any) -> list[str]:
    """The texts in a value: of `auto_map` classes are mapped to code, listed in an older form, or both."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    flat = [part for one in parts for part in (one if isinstance(one, list) else [one])]
    return [str(part)[:80] for part in flat if part]


def refuse_missing_tokenizer(folder: Path) -> None:
    """Refuse a folder without any file that a tokenizer is read from.

    Raises:
        UserError: it names the files that were looked for.
    """
    if not any(next(folder.glob(name), None) for name in _TOKENIZERS):
        raise UserError(f"model.base: {folder} has no tokenizer ({', '.join(_TOKENIZERS)}). {_AGAIN}")


def _check_links(folder: Path) -> None:
    """Refuse links out of the folder: what they lead to would be copied into whatever is made of the model."""
    for path in sorted(folder.iterdir()):
        copied = path.suffix in _COPIED or path.name in _COPIED_BY_NAME
        if copied and path.is_symlink() and not lies_inside(path, folder):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of the folder. Put the file itself there (cp -L): it "
                "is copied into adapters and merged models."
            )


def _check_configs(folder: Path, complete: bool) -> None:
    if not (folder / "config.json").is_file():
        if (folder / _ADAPTER).is_file():
            raise UserError(f"{folder} holds an adapter. Write it as adapter.from, and its base as model.base.")
        if complete:
            is_run = (folder / "manifest.json").is_file()
            remedy = " It is a run: write it as adapter.from, or its merged/ as model.base." if is_run else ""
            raise UserError(f"{folder} has no config.json, so it is not a model folder.{remedy}")
        return
    for name in _READ_BY_ALL:
        if (folder / name).is_file():
            _json(folder / name)
            if name != "generation_config.json" and _json(folder / name).get("auto_map", {}) is None:
                raise UserError(f"{folder / name} says auto_map: null, on which transformers fails. Take the key out.")
    config = _json(folder / "config.json")
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} names no model_type.")
    other = config.get("transformers_weights")
    if other not in (None, SINGLE, INDEX):
        raise UserError(
            f"{folder / 'config.json'} names other weights than {SINGLE} (transformers_weights: {other!r}), which "
            "lorakit does not look for. Rename the file, and take the key out."
        )
    if (folder / _ADAPTER).is_file():
        raise UserError(
            f"{folder} has {_ADAPTER}: transformers puts the adapter that lies there into the model. Merge it into the "
            "model first, or give a folder without it."
        )


def _check_weights(folder: Path, complete: bool) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED))
        found = f" It has {pickled}, which would run code when read: convert it to safetensors." if pickled else ""
        if pickled or complete:
            raise UserError(f"{folder} has no .safetensors file.{found}")
        return
    for file in weight_files(folder, complete):
        read_header(file)


def _check_tokenizer(folder: Path) -> None:
    """Whether tokenizer.json begins and ends as a mapping does; reading all of it takes too long here."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    with file.open("rb") as opened:
        begin = opened.read(4096).strip()
        opened.seek(max(0, file.stat().st_size - 4096))
        end = opened.read().strip()
    if not (begin.startswith(b"{") and end.endswith(b"}")):
        raise UserError(f"{file} is damaged: it holds no JSON mapping from its beginning to its end. {_AGAIN}")


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}. {_AGAIN}") from error
    if not isinstance(read, dict):
        raise UserError(f"{file} holds no mapping. {_AGAIN}")
    return read
