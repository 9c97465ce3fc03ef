"""What every command on a model needs before weights are loaded: base, tokenizer, examples, no `auto` left."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.amounts import gibibytes
from lorakit.atomic_io import sha256_of
from lorakit.data.added_tokens import add_tokens
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.examples import tokenizer_sha256
from lorakit.data.report import Report
from lorakit.distributed.processes import (
    any_of,
    from_first,
    gather,
    is_first_of_node,
    local_size,
    refuse,
    together,
    world_size,
)
from lorakit.errors import BaseModelError, UserError
from lorakit.hardware.devices import devices_of
from lorakit.hardware.machine import Machine, processor, usable_machine
from lorakit.model.companion_files import compare_with_file
from lorakit.model.config_values import Positions
from lorakit.model.load import attentions_of
from lorakit.model.new_rows import with_new_tokens
from lorakit.model.quantization_config import check_quantization
from lorakit.model.resolve import Base, resolve_base
from lorakit.model.tokenizer import load_tokenizer, quiet_libraries, stop_token_ids
from lorakit.plan.activations import spec_with_trace
from lorakit.plan.auto import Choice, resolve_auto
from lorakit.plan.memory import Memory, SizedRun, size_run
from lorakit.plan.model_info import ModelInfo, beyond_training, load_template, read_model_info, refuse_by_config
from lorakit.progress import Progress, Silent
from lorakit.recipe.adapter_kind import effective_model, trains_all
from lorakit.recipe.chat_templates import template_file
from lorakit.recipe.data_files import is_pattern
from lorakit.recipe.load import load
from lorakit.recipe.schema import Data, Model, Recipe
from lorakit.recipe.sharding import describe_idle_sharding, refuse_missing_package
from lorakit.run_dir import COMPLETE, Run
from lorakit.run_inputs import RunRows, changed_weights, locate_base

_COMPARED = 32
"""Rows whose tokens are compared."""

_DIFFERENT = {
    "base": "model.base: the files of the base model are not the same on all machines. Copy them anew.",
    "rows": "data: the rows become other tokens on another machine. Give all machines the same files and versions.",
}


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every `auto` is settled, with its base on disk and its rows as examples."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    base: Base
    machine: Machine
    tokenizer: Any
    rows: RunRows
    report: Report
    """What became of the training rows; of a run that has ended as it was then, whether they are there still or not."""
    has_base: bool = True
    """Whether `base` is the base model; of a full fine-tuning whose base is gone it is what was trained."""
    expected: Memory | None = None
    """What the longest micro-batch is predicted to take; None where the model's sizes are not known."""

    @property
    def train(self) -> Examples:
        return self.rows.train

    @property
    def held_out(self) -> Examples | None:
        return self.rows.held_out

    @property
    def model(self) -> Model:
        """The model section with the quantization in which the base is really held."""
        return effective_model(self.recipe)

    @property
    def steps(self) -> int:
        train = self.recipe.train
        return self.train.mixture.run_steps(train.batch_size, train.epochs, train.steps)

    @property
    def tokens_sha256(self) -> dict[str, str | None]:
        """What the rows became, whatever made it of them: the sha256 of the tokens and labels of each side."""
        return {"train": self.train.tokens_sha256(), "eval": self.held_out.tokens_sha256() if self.held_out else None}

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the model's own, and those that end the trained turns."""
        words = self.report.stop_tokens
        return sorted({*stop_token_ids(self.base, self.tokenizer), *self.tokenizer.convert_tokens_to_ids(words)})


def prepare_run(recipe: Recipe, progress: Progress) -> Prepared:
    """Find the base, read and render the rows, settle every `auto` for this machine; UserError where it cannot run. Of
    several processes the first of each machine reads the rows, which the others then find in the cache, and all take
    what `auto` became from the first of all."""
    machine = _smallest_machine(progress)
    first = together(lambda: _prepare_alone(recipe, machine, progress) if is_first_of_node() else None)
    if world_size() > 1:
        progress.say("the rows are ready; the other processes read them now")
    settled, choices = from_first((first.recipe, first.choices) if first else None)  # type: ignore[misc]
    prepared = together(lambda: first or _prepare_alone(settled, machine, Silent()))
    prepared = replace(prepared, recipe=settled, choices=choices)
    if world_size() > 1:
        own = together(lambda: _content(prepared) if is_first_of_node() else {})
        for what, content in from_first(own).items():
            if any_of(is_first_of_node() and own[what] != content) == (True,):
                refuse(UserError(_DIFFERENT[what]))
    return prepared


def _content(prepared: Prepared) -> dict[str, Any]:
    return {"base": prepared.base.sha256(), "rows": prepared.tokens_sha256}


def _smallest_machine(progress: Progress) -> Machine:
    """The machine with the memory of the smallest device of all; a processor's is shared by the processes on it."""
    machine = usable_machine(progress)
    memory = machine.memory if machine.is_gpu else machine.memory // local_size()
    return replace(machine, memory=min(gather(memory)))


def _prepare_alone(recipe: Recipe, machine: Machine, progress: Progress) -> Prepared:
    refuse_missing_package(recipe.train.sharding, world_size())
    base, template = open_template(recipe, progress)
    info = read_model_info(base.folder)
    refuse_by_config(recipe, info)
    rows = RunRows(recipe.data, template, progress)
    train, report = rows.train, rows.train.report
    warn_of_tokenizer_differences(base, template.tokenizer, train, progress)
    train.mixture.refuse_extremes()
    if info and not info.spec:  # a family that is not counted: built without weights
        info = replace(info, spec=spec_with_trace(base.folder, recipe.adapter))
    longest = max(examples.report.longest for examples in (train, rows.held_out) if examples)
    if too_long := beyond_training(recipe, info, longest):
        progress.warn(too_long)
    if idle := describe_idle_sharding(recipe.train, world_size()):
        progress.say(idle)
    prepared = _settle(recipe, base, template, rows, report, info, machine)
    if info and info.spec:
        settled = prepared.recipe.train
        devices = devices_of(prepared.machine, world_size())
        card = machine.memory if machine.is_gpu else 0
        sized = size_run(prepared.recipe, info, info.spec, machine.is_gpu, devices, card)
        memory = sized.memory(int(settled.micro_batch), report.longest, bool(settled.gradient_checkpointing))
        prepared = replace(prepared, expected=memory)
        refuse_to_offload(sized, report.longest)
    return prepared


def refuse_to_offload(sized: SizedRun, longest: int) -> None:
    """Refuse to send more activations to main memory than it has room for."""
    train = sized.recipe.train
    sent = sized.offloaded(min(int(train.micro_batch), sized.rows), longest, bool(train.gradient_checkpointing))
    free = processor().memory // local_size()
    if sent > free:
        message = f"{gibibytes(sent)} of activations do not fit into the {gibibytes(free)} of main memory that are free"
        raise UserError(f"train.offload_activations: {message}. Write false, or a smaller micro_batch.")


def _settle(
    recipe: Recipe,
    base: Base,
    template: ChatTemplate,
    rows: RunRows,
    report: Report,
    info: ModelInfo | None,
    machine: Machine,
) -> Prepared:
    """The recipe without `auto`; of `model.template_date` too, where the chat template writes a day."""
    choices: tuple[Choice, ...] = ()
    if recipe.model.template_date == "auto":
        model = recipe.model.model_copy(update={"template_date": template.date})
        recipe = recipe.model_copy(update={"model": model})
        reason = "the chat template writes today's date, and the run keeps the day on which it began"
        choices = (Choice("model.template_date", template.date, reason),) if template.date else ()
    devices = devices_of(machine, world_size())
    recipe, settled = resolve_auto(
        recipe, machine, info, report.longest, attentions_of(base), report.mean_length, devices, report.examples
    )
    return Prepared(recipe, (*choices, *settled), base, machine, template.tokenizer, rows, report)


def warn_of_tokenizer_differences(base: Base, tokenizer: Any, train: Examples, progress: Progress) -> None:
    """Warn where some of the rows are other tokens than the base's tokenizer.json makes of them."""
    rows = train.rows
    some = range(0, len(rows), max(1, len(rows) // _COMPARED))
    texts = [tokenizer.decode(rows[at]["input_ids"]) for at in some[:_COMPARED]]
    if difference := compare_with_file(base.folder, tokenizer, texts):
        progress.warn(f"model.base: {base.name}: {difference}")


def open_template(recipe: Recipe, progress: Progress, revision: str | None = None) -> tuple[Base, ChatTemplate]:
    """The recipe's base on disk, and its tokenizer with the chat template that the rows are rendered by; UserError
    where either is missing or damaged. `revision`: another one than the recipe's."""
    quiet_libraries()
    base = resolve_base(recipe.model.base, revision or recipe.model.revision, progress)
    read_model_info(base.folder)  # names a damaged value, over which the tokenizer's loading would stumble otherwise
    check_quantization(base, effective_model(recipe), trains_all(recipe.adapter))
    if recipe.model.add_tokens:
        tokenizer = load_tokenizer(base, recipe.model.chat_template)
        base = with_new_tokens(base, tokenizer, add_tokens(tokenizer, recipe.model.add_tokens, base.name))
    return base, load_template(recipe, base)


def reopen_run(
    folder: Path, progress: Progress, base: str | None = None, option: str = "--base"
) -> tuple[Run, Prepared]:
    """A finished run with what it was trained from, which must be what it was (UserError). `base` says where its base
    model lies now, where that is another place, and `option` how the user does. Its rows are read when they are
    needed."""
    run = Run(folder)
    manifest = run.read_manifest()
    if manifest.get("status") != COMPLETE:
        raise UserError(f"{folder}: its training has not ended. Continue it with lorakit train --resume.")
    # What the adapter began from may be gone by now, and a compiler; neither is needed any more.
    loaded = load(run.recipe, ["adapter.from=null", "train.compile=off"], ended=True)
    with loaded.locating(), _naming_option(base, option):
        recipe, opened, template, has_base = _open_inputs(loaded.recipe, run, manifest, base, progress, option)
        rows = RunRows(recipe.data, template, progress, run, manifest)
        try:
            report = Report.from_dict(manifest["data"]["train"])
        except (KeyError, TypeError):  # of another version
            report = rows.train.report
        prepared = _settle(
            recipe, opened, template, rows, report, read_model_info(opened.folder), usable_machine(progress)
        )
    prepared = replace(prepared, has_base=has_base)
    refuse_other_base(prepared, manifest, folder, f" Write {option} with the place of its own.")
    refuse_changed_weights(run, manifest)
    return run, prepared


def refuse_changed_weights(run: Run, manifest: dict[str, Any]) -> None:
    """Refuse a run whose adapter or model is not what was trained."""
    files = {run.model / name: recorded for name, recorded in manifest.get("model_sha256", {}).items()}
    keys = {"adapter_model.safetensors": "adapter_sha256", "adapter_config.json": "adapter_config_sha256"}
    for name, key in keys.items():
        if (run.adapter / name).is_file() and key in manifest:
            files[run.adapter / name] = manifest[key]
    for file, recorded in files.items():
        if not file.is_file() or sha256_of(file) != recorded:
            raise UserError(f"{file}: is not what this run trained: its sha256 is not the manifest's.")


@contextmanager
def _naming_option(base: str | None, option: str) -> Iterator[None]:
    """An error about a base that --base names says so, instead of where the recipe names its own; else it names the
    option, since the base may lie elsewhere now."""
    try:
        yield
    except BaseModelError as error:
        if base is None:
            raise BaseModelError(f"{error} Or write {option} with the place where it is now.") from error
        raise UserError(f"--base: {error}") from error


def _open_inputs(
    recipe: Recipe, run: Run, manifest: dict[str, Any], base: str | None, progress: Progress, option: str
) -> tuple[Recipe, Base, ChatTemplate, bool]:
    """The recipe of a run with its base where that lies now, the base, the chat template that the rows were rendered
    by, and whether the base is there: what a full fine-tuning wrote stands in for it."""
    place = locate_base(recipe, run, manifest, base, option)
    for file in _template_places(recipe.model.chat_template, run):
        update = {"chat_template": file, **({"base": place[0]} if place else {})}
        changed = recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})
        if place:
            opened, template = open_template(changed, progress, place[1])
        else:
            opened = Base(str(manifest["base"].get("name")), run.model, str(manifest["base"].get("origin")))
            template = load_template(changed, opened)
        if tokenizer_sha256(template.tokenizer) == manifest.get("tokenizer_sha256"):
            break
    return changed, opened, template, place is not None


def _template_places(own: str | None, run: Run) -> list[str | None]:
    """Where the chat template of a run may lie: at the recipe's own path, or as this lorakit has it by that name, and
    beside what the run trained."""
    if own is None:
        return [None]
    copies = (folder / "chat_template.jinja" for folder in (run.adapter, run.model))
    return [one for one in (own, *map(str, copies)) if template_file(one).is_file()] or [own]


def refuse_other_base(prepared: Prepared, manifest: dict[str, Any], folder: Path, remedy: str = "") -> None:
    """Refuse a base whose weights, configuration, tokenizer, or tokens that end an answer are not those that the run in
    `folder` was trained with. `remedy`: what to write where its weights are others."""
    base, recorded = prepared.base, manifest["base"]
    if prepared.has_base and (changed := changed_weights(base, recorded["sha256"])):
        raise UserError(
            f"{folder}: was trained on other weights or another configuration of {base.name} than those found now "
            f"({base.origin}): {', '.join(changed[:3])} differ. The run says: {recorded.get('origin')}.{remedy}"
        )
    if tokenizer_sha256(prepared.tokenizer) != manifest.get("tokenizer_sha256"):
        raise UserError(f"{folder}: the tokenizer of {base.name} or its chat template changed since it was trained.")
    stops = stop_token_ids(base, prepared.tokenizer)
    if prepared.has_base and recorded.get("stop_token_ids") not in (None, stops):
        raise UserError(
            f"{folder}: was trained with the tokens {recorded['stop_token_ids']} as the ends of an answer, and "
            f"{base.name} names {stops} now (eos_token_id in generation_config.json or config.json). Put the files "
            "back as they were."
        )


@dataclass(frozen=True)
class GivenRows:
    """Rows of the command line: the file of `--data`, and its `--format` and `--columns` (ours -> theirs) where they
    are not those of the run's recipe."""

    file: Path
    format: Any = None
    columns: dict[str, str] | None = None

    def __str__(self) -> str:
        return str(self.file)


def data_of_file(rows: Path | GivenRows, like: Data | None, positions: Positions | None) -> Data:
    """The data section of `--data FILE`: like that of a recipe, or rows up to the end of the model's positions."""
    given = GivenRows(rows) if isinstance(rows, Path) else rows
    if not given.file.exists() and not is_pattern(given.file):
        raise UserError(f"--data: {given}: there is no such file.")
    if like is None:
        like = Data(train="-", max_length=max(positions.limit if positions else 1024, 8))
    own = {"format": given.format, "columns": given.columns}
    update = {name: value for name, value in own.items() if value is not None}
    return like.model_copy(update={"train": str(given.file.absolute()), "eval": None, **update})
