"""What is merged: the adapter of a run, or of a folder alone, with its base and with rows to judge the merge by."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.data.general_texts import encode_text, read_general_texts
from lorakit.errors import UserError
from lorakit.model.layerwise import layerwise_model
from lorakit.model.load import (
    DEQUANTIZING_INT8,
    attentions_of,
    dequantize,
    load_model,
    stored_dtype,
    summarize_quantization,
)
from lorakit.model.new_rows import with_rows_of
from lorakit.model.peft_adapter import adapter_config
from lorakit.model.quantization_config import refuse_irreversible, stored_quantization
from lorakit.model.resolve import Base, resolve_base
from lorakit.model.spec_from_meta import read_hf_config
from lorakit.model.state_dict import WeightPrecision, Weights
from lorakit.model.tokenizer import load_tokenizer, quiet_libraries, stop_token_ids, stop_words
from lorakit.plan.model_info import read_model_info
from lorakit.prepare import GivenRows, Prepared, data_of_file
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.paths import input_paths
from lorakit.recipe.schema import Data, Model
from lorakit.run_dir import Run
from lorakit.run_inputs import MissingRows, recorded_base, warn_of_other_base

Onto = Literal["trained", "original"]

# Rows by which a merge is judged, and which they are: held-out, training, general, or the name of a file.
Rows = tuple[list[dict[str, Any]], str]


@dataclass(frozen=True)
class MergeInput:
    """An adapter, and what it was trained on. `folder` is as it was given, `model` the settings of the base in
    training: its type and quantization. `files` is what else the run was made from: no merge may replace it."""

    folder: Path
    name: str
    adapter: Path
    base: Base
    model: Model
    tokenizer: Any
    stop_ids: list[int]
    base_sha256: dict[str, str]
    read_rows: Callable[[], Rows]
    is_run: bool = False
    files: tuple[Path, ...] = ()
    rounds_int8_inputs: bool = False  # whether LLM.int8 did so in the training
    names_held_out: bool = False

    @property
    def attention(self) -> str:
        """An implementation that needs no GPU and predicts the same as that of the training."""
        return "sdpa" if self.model.attention != "eager" and "sdpa" in attentions_of(self.base) else "eager"

    @property
    def quantization(self) -> str:
        """The base's quantization in training, by the recipe or by the checkpoint itself."""
        stored = stored_quantization(self.base.folder)
        return stored.quantization if stored else self.model.quantization


def input_of_run(
    run: Run, prepared: Prepared, progress: Progress, file: Path | GivenRows | None = None, adapter: Path | None = None
) -> MergeInput:
    """The adapter of a run, or another one on the same base, with the rows of `file` or the run's own to judge by."""
    recipe, manifest = prepared.recipe, run.read_manifest()
    if trains_all(recipe.adapter):
        raise UserError(f"{run.folder}: trained the weights themselves, in {run.model}: there is no adapter to merge.")

    def read_rows() -> Rows:
        if file is not None:
            return _rows_of_file(file, recipe.data, prepared.base, prepared.rows.template, progress)
        return rows_of_run(prepared, progress)

    return MergeInput(
        run.folder,
        str(recipe.name),
        adapter or run.adapter,
        prepared.base,
        prepared.model,
        prepared.tokenizer,
        prepared.stop_ids,
        manifest["base"]["sha256"],
        read_rows,
        is_run=True,
        files=tuple(input_paths(recipe)),
        rounds_int8_inputs=manifest["machine"]["device"] not in DEQUANTIZING_INT8,
        names_held_out=recipe.data.eval is not None,
    )


def rows_of_run(prepared: Prepared, progress: Progress) -> Rows:
    """The rows that a run brings to compare models or tokenizers on: the held-out ones, those of the training where it
    names none, and general texts, which is said, where these are not here."""
    try:
        held_out = prepared.held_out
        return list((held_out or prepared.train).rows), "held-out" if held_out else "training"
    except UserError as error:
        tell = progress.say if isinstance(error, MissingRows) else progress.warn
        tell(f"general texts stand in for the rows of the run, which cannot be read: {error}")
        return _general_rows(prepared.base, prepared.tokenizer)


def input_of_adapter(
    folder: Path, base: str | None, progress: Progress, file: Path | GivenRows | None = None
) -> MergeInput:
    """The adapter of a folder in PEFT's format, with the rows of `file` or general texts to judge by. Nothing records
    the base's type and quantization in training, so the adapter is put on the weights as they are on disk."""
    quiet_libraries()
    model = _find_base_of(folder, base, progress)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(Base(str(folder), folder if has_tokenizer else model.folder, model.origin), None)
    template = ChatTemplate(tokenizer, stop_words=stop_words(model, tokenizer))

    def read_rows() -> Rows:
        return _rows_of_file(file, None, model, template, progress) if file else _general_rows(model, tokenizer)

    settings = Model(base=model.name).model_copy(update={"dtype": stored_dtype(model), "attention": "auto"})
    stops = tokenizer.convert_tokens_to_ids(sorted(template.stops)) if tokenizer.chat_template else []
    stop_ids = sorted({*stop_token_ids(model, tokenizer), *stops})
    return MergeInput(
        folder, folder.resolve().name, folder, model, settings, tokenizer, stop_ids, model.sha256(), read_rows
    )


def _find_base_of(folder: Path, given: str | None, progress: Progress) -> Base:
    config = adapter_config(folder)
    name = given or config.base_model_name_or_path
    if not name:
        raise UserError(f"{folder}: its adapter_config.json names no base model. Write --base with a folder or hub id.")
    try:
        base = resolve_base(name, "main" if given else config.revision or "main", progress)
    except UserError as error:
        where, remedy = ("--base", "") if given else (folder, " Or write --base with the place where it is.")
        raise UserError(f"{where}: {error}{remedy}") from error
    source = "--base" if given else "its adapter_config.json"
    warn_of_other_base(folder, base, recorded_base(folder), progress)
    progress.say(f"{folder}: put on {base.name} ({base.origin}), which {source} names, unquantized as it is on disk")
    return with_rows_of(folder, base)


def _rows_of_file(
    file: Path | GivenRows, like: Data | None, base: Base, template: ChatTemplate, progress: Progress
) -> Rows:
    info = read_model_info(base.folder)
    data = data_of_file(file, like, info.positions if info else None)
    return list(examples_of(data, template, progress)[0].rows), str(file)


def _general_rows(base: Base, tokenizer: Any) -> Rows:
    config = read_hf_config(base.folder)
    tokens = [encode_text(tokenizer, row.text, config) for row in read_general_texts()]
    return [{"input_ids": ids, "labels": ids} for ids in tokens if len(ids) > 1], "general"


@contextmanager
def unquantized_base(given: MergeInput, onto: Onto, output: Path, progress: Progress) -> Iterator[tuple[Path, Model]]:
    """The base's folder, or a temporary dequantized copy of it if its checkpoint is quantized, and its settings."""
    stored = stored_quantization(given.base.folder)
    refuse_irreversible(stored, given.base.name)
    if stored is None:
        yield given.base.folder, given.model
        return
    if onto == "original":
        raise UserError(
            f"--onto original: the weights of {given.base.name} are {stored.quantization} on disk: there are no "
            "full-precision ones to merge into. Leave --onto out."
        )
    progress.say(f"{given.base.name}: dequantizing the checkpoint, which takes the memory of the whole model")
    exact = given.model.model_copy(update={"dtype": "float32", "attention": "eager"})
    model = load_model(given.base, exact, "cpu")
    plain = dequantize(model) if summarize_quantization(model) else model
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".lorakit-draft.{output.name}.") as folder:
        plain.save_pretrained(folder)
        del model, plain
        yield Path(folder), given.model.model_copy(update={"quantization": "none"})


def adapter_model(given: MergeInput, weights: Weights, precision: WeightPrecision) -> Any:
    """The model with the adapter beside its weights, on the base in this precision."""
    read, pieces = partial(precision.read, weights), partial(precision.pieces, weights)
    return layerwise_model(weights.folder, given.attention, read, pieces, given.adapter)
