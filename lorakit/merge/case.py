"""What a merge and its proof stand on: an adapter, its base as it was held in training, and rows to judge by."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import LorakitError, UserError
from lorakit.merge.inputs import MergeInput, Rows
from lorakit.merge.proof import TOLERANCES, Proof, compare, compute_reference
from lorakit.model.layerwise import layerwise_adapter_model, layerwise_model
from lorakit.model.load import attentions_of, load_model
from lorakit.model.quantization_config import check_mergeable, stored_quantization
from lorakit.model.quantized_model import dequantize, summarize_quantization
from lorakit.model.quantized_weights import RoundedWeights, WeightPrecision
from lorakit.model.resolve import Base
from lorakit.model.safetensors_reader import TYPES
from lorakit.model.state_dict import Weights, open_weights
from lorakit.model.tokenizer import pad_token_id
from lorakit.progress import Progress
from lorakit.recipe.schema import Model

Onto = Literal["trained", "original"]


@dataclass(frozen=True)
class MergeResult:
    """A merged model and what is known of it."""

    folder: Path
    onto: Onto
    quantization: str
    """In which the adapter was trained on the base."""
    dtype: str
    """The coarsest type of its weights, by which it was judged."""
    rows_of: str
    """Which rows judged (lorakit.merge.inputs); empty where none did."""
    proof: Proof | None
    """Against the adapter on the weights that were merged into; None where none was asked for."""
    drift: Proof | None
    """Against the adapter on the weights that it was trained on, where those are others."""
    untied: bool = False
    """Whether it has two weights where its base ties them: the adapter changed one of them, or each otherwise."""


@dataclass(frozen=True)
class Case:
    """An adapter, the weights it stands on, and the rows by which merges of it are judged."""

    given: MergeInput
    weights: Weights
    progress: Progress

    @cached_property
    def rows(self) -> Rows:
        """The rows that judge, and whose they are; read when they are needed."""
        return self.given.read_rows()

    @property
    def _attention(self) -> str:
        named = self.given.model.attention
        if named == "eager" or "sdpa" not in attentions_of(self.given.base):
            return "eager"
        return "sdpa"  # which predicts the same as kernels that need a GPU

    def adapter_model(self, held: WeightPrecision) -> Any:
        """The model with the adapter beside its weights, on the base as it is held."""
        base = RoundedWeights(self.weights, held)
        folder = self.weights.folder
        return layerwise_adapter_model(folder, self._attention, base.read, self.given.adapter, base.pieces)

    def proofs(self, merged: Path, written: str, holds: list[WeightPrecision]) -> list[Proof]:
        """The merged folder against the adapter on each way of holding its base, on the same rows."""
        pad, (rows, _) = pad_token_id(self.given.tokenizer), self.rows
        expected = [compute_reference(self.adapter_model(held), rows, pad, self.progress) for held in holds]
        written_weights = open_weights(merged)
        found = layerwise_model(merged, self._attention, written_weights.read, written_weights.pieces)
        return compare(expected, found, pad, TOLERANCES[written].tie, self.progress)


def check_proof(proof: Proof, written: str, what: str, behind: str) -> None:
    """Refuse a merged model, named by `what`, whose proof does not hold for weights of the type `written`.

    Raises:
        LorakitError: it says what does not hold, and then `behind`.
    """
    failures = proof.failures(TOLERANCES[written])
    if failures:
        raise LorakitError(f"{what} does not answer as the adapter does: {'; '.join(failures)}.{behind}")


def refuse_unmergeable(base: Base, onto: Onto) -> None:
    """Refuse a base that nothing can be added to.

    Raises:
        UserError: it is one.
    """
    check_mergeable(base)
    stored = stored_quantization(base.folder)
    if stored and onto == "original":
        raise UserError(
            f"--onto original: the weights of {base.name} are {stored.quantization} on disk: there are no "
            "full-precision ones to merge into. Leave --onto out."
        )


@contextmanager
def plain_base(given: MergeInput, output: Path, progress: Progress) -> Iterator[tuple[Path, Model]]:
    """The base's folder, and how its weights were held in training.

    Of a checkpoint that is quantized itself it is a copy with plain weights, which exists only inside.
    """
    settings = given.model
    if stored_quantization(given.base.folder) is None:
        yield given.base.folder, settings
        return
    progress.say(f"{given.base.name}: dequantizing the checkpoint, which takes the memory of the whole model")
    exact = settings.model_copy(update={"dtype": "float32", "attention": "eager"})
    model = load_model(given.base, exact, "cpu")
    plain = dequantize(model) if summarize_quantization(model) else model
    prefix = f".lorakit-draft.{output.name}."
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=prefix) as folder:
        plain.save_pretrained(folder)
        del model, plain
        yield Path(folder), settings.model_copy(update={"quantization": "none"})


def training_quantization(given: MergeInput) -> str:
    """In which the base was held in training, be it that of the recipe or of the checkpoint itself."""
    stored = stored_quantization(given.base.folder)
    return stored.quantization if stored else given.model.quantization


def coarsest_dtype(types: list[str]) -> str:
    """The coarsest of safetensors' types, as a word of ours."""
    by_coarseness = ["bfloat16", "float16", "float32"]
    words = {str(TYPES[word]).removeprefix("torch.") for word in types}
    return next((word for word in by_coarseness if word in words), "float32")
