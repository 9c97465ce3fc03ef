"""A GGUF file's header, read back: metadata, and the number format of each tensor."""

from collections import Counter
from collections.abc import Callable
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
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.") from error
    try:
        reader = GGUFReader(path)
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
