"""A GGUF file's header, read back: metadata, and the number format of each tensor."""

import io
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.model.config_values import Positions, is_size


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its name, the format of its numbers, how many there are, the bytes that they take, how many
    dimensions it has, and the length of the innermost."""

    name: str
    format: str
    numbers: int
    bytes: int
    dimensions: int
    width: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself. `metadata` has no array longer than the vocabulary's lists, which are lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits of the tensors' data over all their numbers."""
        return 8 * sum(tensor.bytes for tensor in self.tensors) / sum(tensor.numbers for tensor in self.tensors)

    @cached_property
    def formats(self) -> dict[str, float]:
        """The share of all matrices' numbers in each format, the largest first."""
        counts: Counter[str] = Counter()
        for tensor in self.matrices:
            counts[tensor.format] += tensor.numbers
        return {name: count / counts.total() for name, count in counts.most_common()}

    @property
    def matrices(self) -> list[GgufTensor]:
        return [tensor for tensor in self.tensors if tensor.dimensions > 1]

    def share_of(self, which: Callable[[GgufTensor], bool]) -> float:
        """The share of all matrices' numbers that lie in those matrices."""
        chosen = sum(tensor.numbers for tensor in self.matrices if which(tensor))
        return chosen / sum(tensor.numbers for tensor in self.matrices)

    @property
    def main_format(self) -> str:
        """The format of most of the matrices' numbers."""
        return next(iter(self.formats), "")

    @property
    def positions(self) -> Positions | None:
        """How many positions the model has; a limit where each has an embedding, beyond which llama.cpp ends the whole
        process (ggml's get_rows asserts)."""
        key = f"{self.metadata.get('general.architecture')}.context_length"
        limit = self.metadata.get(key)
        if not is_size(limit):
            return None
        learned = any(tensor.name == "position_embd.weight" for tensor in self.tensors)
        return Positions(limit, learned, f"{key} in its header")

    @property
    def tokens(self) -> list[str]:
        return list(self.metadata.get("tokenizer.ggml.tokens", []))

    @property
    def chat_template(self) -> str | None:
        return self.metadata.get("tokenizer.chat_template")


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file; a UserError where it cannot be read."""
    reader_class = _reader_class(path)
    try:
        reader = reader_class(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = tuple(
            GgufTensor(
                one.name, one.tensor_type.name, int(one.n_elements), int(one.n_bytes), len(one.shape), int(one.shape[0])
            )
            for one in reader.tensors
        )
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(f"{path}: not a readable GGUF file: {error}.") from error
    return GgufFile(path, metadata, tensors)


def write_flag(path: Path, name: str, value: bool) -> None:
    """Change a true or false of a GGUF file's metadata, in place; a file that lacks it is written anew beside it."""
    reader = _reader_class(path)(path, "r+")
    entry = reader.get_field(name)
    if entry is not None:
        entry.parts[entry.data[0]][0] = value
        reader.data.flush()
        return
    from gguf import GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    copy = path.with_name(f"{path.name}.copy")
    writer = GGUFWriter(copy, reader.get_field("general.architecture").contents(), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    with redirect_stderr(io.StringIO()):  # it shows a bar
        copy_with_new_metadata(reader, writer, {name: MetadataDetails(GGUFValueType.BOOL, value)}, [])
    copy.replace(path)


def _reader_class(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.") from error
    return GGUFReader
