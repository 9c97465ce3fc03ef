"""What is merged: the adapter of a run, or of a folder alone, with its base and with rows to judge the merge by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.examples import examples_of
from lorakit.data.general_texts import encoded_text, general_rows
from lorakit.data.rendering import ChatTemplate
from lorakit.errors import UserError
from lorakit.model.load import stored_dtype
from lorakit.model.peft_adapter import adapter_config
from lorakit.model.resolve import Base, resolve_base
from lorakit.model.spec_from_meta import read_hf_config
from lorakit.model.tokenizer import load_tokenizer, quiet_libraries, stop_token_ids, stop_words
from lorakit.plan.model_info import read_model_info
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.data_files import is_pattern
from lorakit.recipe.inputs import input_paths
from lorakit.recipe.schema import Data, Model
from lorakit.run_dir import Run

Rows = tuple[list[dict[str, Any]], str]
"""Rows by which a merge is judged, and which they are: held-out, training, general, or the name of a file."""

_LONGEST = 1024
"""Tokens of a row, where neither a recipe nor the model says how many it may have."""


@dataclass(frozen=True)
class MergeInput:
    """An adapter, and what it was trained on."""

    folder: Path
    """As it was given."""
    name: str
    is_run: bool
    adapter: Path
    base: Base
    model: Model
    """How the base was held in training."""
    tokenizer: Any
    stop_ids: list[int]
    base_sha256: dict[str, str]
    read_rows: Callable[[], Rows]
    files: tuple[Path, ...] = ()
    """What else the run was made from: no merge may replace it."""
    on_gpu: bool = False
    names_held_out: bool = False


def input_of_run(
    run: Run, prepared: Prepared, progress: Progress, file: Path | None = None, adapter: Path | None = None
) -> MergeInput:
    """The adapter of a run, or another one on the same base.

    Args:
        file: rows to judge by, instead of the run's own.

    Raises:
        UserError: the run has no adapter.
    """
    if trains_all(prepared.recipe.adapter):
        raise UserError(
            f"{run.folder}: there is no adapter to merge: this run trained the weights themselves. Its model is "
            f"{run.model}."
        )
    manifest = run.read_manifest()

    def rows() -> Rows:
        if file is not None:
            return _rows_of_file(file, prepared.recipe.data, prepared.rows.template, progress)
        try:
            held_out = prepared.held_out
            return list((held_out or prepared.train).rows), "held-out" if held_out else "training"
        except UserError as error:
            progress.warn(f"proved on general texts, since the rows of the run cannot be read: {error}")
            return _general(prepared.base, prepared.tokenizer)

    return MergeInput(
        folder=run.folder,
        name=str(prepared.recipe.name),
        is_run=True,
        adapter=adapter or run.adapter,
        base=prepared.base,
        model=prepared.model,
        tokenizer=prepared.tokenizer,
        stop_ids=prepared.stop_ids,
        base_sha256=manifest["base"]["sha256"],
        read_rows=rows,
        files=tuple(input_paths(prepared.recipe)),
        on_gpu=manifest["machine"]["device"] == "cuda",
        names_held_out=prepared.recipe.data.eval is not None,
    )


def input_of_adapter(folder: Path, base: str | None, progress: Progress, file: Path | None = None) -> MergeInput:
    """The adapter of a folder in PEFT's format. How its base was held in training nobody recorded: it is put on the
    weights as they lie on disk.

    Args:
        base: a folder or hub id; the adapter_config.json names one where this is None.
        file: rows to judge by, instead of general texts.

    Raises:
        UserError: the folder holds no adapter, or its base cannot be had.
    """
    quiet_libraries()
    found = _base_of(folder, base, progress)
    model = Model(base=found.name).model_copy(update={"dtype": stored_dtype(found), "attention": "auto"})
    beside = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(Base(str(folder), folder if beside else found.folder, found.origin), None)
    template = ChatTemplate(tokenizer, stop_words=stop_words(found, tokenizer))

    def rows() -> Rows:
        if file is None:
            return _general(found, tokenizer)
        facts = read_model_info(found.folder)
        longest = facts.positions.limit if facts and facts.positions else _LONGEST
        return _rows_of_file(file, Data(train="-", max_length=max(longest, 8)), template, progress)

    stops = sorted(template.stops) if tokenizer.chat_template else []
    return MergeInput(
        folder=folder,
        name=folder.resolve().name,
        is_run=False,
        adapter=folder,
        base=found,
        model=model,
        tokenizer=tokenizer,
        stop_ids=sorted({*stop_token_ids(found, tokenizer), *tokenizer.convert_tokens_to_ids(stops)}),
        base_sha256=found.sha256(),
        read_rows=rows,
    )


def _base_of(folder: Path, named: str | None, progress: Progress) -> Base:
    config = adapter_config(folder)
    own = config.base_model_name_or_path
    if not (named or own):
        raise UserError(f"{folder}: its adapter_config.json names no base model. Write --base with a folder or hub id.")
    try:
        base = resolve_base(named or own, "main" if named else config.revision or "main", progress)
    except UserError as error:
        reason = str(error).removeprefix("model.base: ")
        where = "--base" if named else f"{folder}"
        remedy = "" if named else " Or write --base with the place where it is."
        raise UserError(f"{where}: {reason}{remedy}") from error
    source = "--base" if named else "its adapter_config.json"
    progress.say(f"{folder}: put on {base.name} ({base.origin}), which {source} names, unquantized as it lies on disk")
    return base


def _rows_of_file(file: Path, like: Data, template: ChatTemplate, progress: Progress) -> Rows:
    if not file.exists() and not is_pattern(file):
        raise UserError(f"--data: {file}: there is no such file.")
    data = like.model_copy(update={"train": str(file.absolute()), "eval": None})
    return list(examples_of(data, template, progress)[0].rows), str(file)


def _general(base: Base, tokenizer: Any) -> Rows:
    config = read_hf_config(base.folder)
    tokens = [encoded_text(tokenizer, row.text, config) for row in general_rows()]
    return [{"input_ids": ids, "labels": ids} for ids in tokens if len(ids) > 1], "general"
