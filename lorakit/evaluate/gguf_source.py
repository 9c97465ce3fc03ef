"""A GGUF file as a model to score: what its header says of it, and what it was exported from."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.atomic_io import read_json_object, sha256_of
from lorakit.errors import UserError
from lorakit.model.gguf_file import GgufFile, read_gguf
from lorakit.model.gguf_tokenizer import load_gguf_tokenizer
from lorakit.model.llama_cpp import GgufModel, llama_cpp_version
from lorakit.run_dir import EXPORT

_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")
_ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True, eq=False)
class GgufSource:
    """A GGUF file, or the first of the parts that it was split into."""

    path: Path
    parts: tuple[Path, ...]

    @cached_property
    def header(self) -> GgufFile:
        """What the file says of itself, with the tensors of all its parts."""
        headers = [read_gguf(part) for part in self.parts]
        return replace(headers[0], tensors=tuple(tensor for header in headers for tensor in header.tensors))

    @cached_property
    def tokenizer(self) -> Any:
        return load_gguf_tokenizer(self.path)

    @cached_property
    def export(self) -> dict[str, Any]:
        """What the export.json beside the file says, if it is about this file."""
        facts = read_json_object(self.path.with_name(EXPORT)) or {}
        files = facts.get("sha256")
        of_file = files.get(self.path.name) if isinstance(files, dict) else None
        same = isinstance(of_file, dict) and of_file.get("sha256") == sha256_of(self.path)
        return facts if same else {}

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that the header names as ends of an answer, of a turn or of a message."""
        named = (self.header.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS)
        return sorted({token for token in named if isinstance(token, int)})

    def identity(self) -> dict[str, Any]:
        """All that decides what llama.cpp computes with the file."""
        return {"gguf": [sha256_of(part) for part in self.parts], "runtime": llama_cpp_version()}

    def facts(self) -> dict[str, Any]:
        """Its size and formats, as documents have them."""
        header = self.header
        formats = {name: round(share, 4) for name, share in header.formats.items()}
        size = sum(part.stat().st_size for part in self.parts)
        return {"bytes": size, "bits_per_weight": round(header.bits_per_weight, 3), "formats": formats}


def open_gguf(path: Path) -> GgufSource:
    """A GGUF file that llama.cpp can run; a UserError where it cannot, before anything is computed."""
    source = GgufSource(path, _parts(path))
    kind = source.header.metadata.get("general.type", "model")
    if kind != "model":
        what = "an adapter alone, without the base that it changes" if kind == "adapter" else f"of the type {kind!r}"
        raise UserError(f"{path}: is {what}, not a model. Give a GGUF file of a whole model.")
    GgufModel(path).close()
    return source


def _parts(path: Path) -> tuple[Path, ...]:
    """All parts of a file that gguf-split cut into several, of which llama.cpp is given the first."""
    split = _PART.search(path.name)
    if split is None:
        return (path,)
    names = [path.name[: split.start()] + f"-{at:05}-of-{split[1]}.gguf" for at in range(1, int(split[1]) + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise UserError(f"{path}: is one of {len(names)} parts, and {missing[0]} is not beside it. Put it there.")
    return tuple(path.with_name(name) for name in names)
