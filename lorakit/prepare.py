"""What every command on a model needs before weights are loaded: base, tokenizer, examples, no `auto` left."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorakit.amounts import gibibytes
from lorakit.atomic_io import sha256_of
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.examples import examples_of, file_sha256s, held_out_of, tokenizer_sha256
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
from lorakit.model.quantization_config import check_quantization
from lorakit.model.resolve import Base, resolve_base
from lorakit.model.tokenizer import quiet_libraries, stop_token_ids
from lorakit.plan.activations import spec_with_trace
from lorakit.plan.auto import Choice, resolve_auto
from lorakit.plan.memory import Memory, SizedRun, size_run
from lorakit.plan.model_info import ModelInfo, beyond_training, load_template, read_model_info, refuse_by_config
from lorakit.progress import Progress, Silent
from lorakit.recipe.adapter_kind import effective_model, trains_all
from lorakit.recipe.data_files import is_pattern
from lorakit.recipe.load import load
from lorakit.recipe.paths import is_path
from lorakit.recipe.schema import Data, Model, Recipe
from lorakit.recipe.sharding import describe_idle_sharding, refuse_missing_package
from lorakit.run_dir import Run, versions

_COMPARED = 32
"""Rows whose tokens are compared."""

_DIFFERENT = {
    "base": "model.base: the files of the base model are not the same on all machines. Copy them anew.",
    "rows": "data: the rows become other tokens on another machine. Give all machines the same files and versions.",
}


class RunRows:
    """Both sides of a recipe's rows, where a file of held-out rows is read without the rows that are trained on. A
    `UserError` where they cannot be read. `manifest`: of the run that has ended."""

    def __init__(
        self, settings: Data, template: ChatTemplate, progress: Progress, manifest: dict[str, Any] | None = None
    ) -> None:
        self.template = template
        self._settings, self._progress, self._manifest = settings, progress, manifest
        self._warned: set[str] = set()

    def read_or_warn(self, side: Literal["train", "held_out"]) -> Examples | None:
        """One side, or None where it cannot be read, with a warning."""
        lost = {
            "train": "nothing is compared with the rows of the training, which cannot be read",
            "held_out": "nothing is scored on held-out rows that cannot be read",
        }
        try:
            return self.train if side == "train" else self.held_out
        except UserError as error:
            self._warn_once(f"{lost[side]}: {error}")
            return None

    @cached_property
    def _both(self) -> tuple[Examples, Examples | None]:
        train, held_out = examples_of(self._settings, self.template, self._progress)
        self._warn_of_changes(held_out, all_rows=True)
        return train, held_out

    @property
    def train(self) -> Examples:
        """What is trained on."""
        return self._both[0]

    @cached_property
    def held_out(self) -> Examples | None:
        """What is never trained on; None where the recipe names none."""
        if "_both" in vars(self) or self._settings.eval is None or isinstance(self._settings.eval, float):
            return self._both[1]
        held_out = held_out_of(self._settings, self.template, self._progress)
        self._warn_of_changes(held_out, all_rows=False)
        return held_out

    def _warn_of_changes(self, held_out: Examples | None, all_rows: bool) -> None:
        """Warn where the rows are not those of the training. They are known by their sha256, wherever they lie now.
        `all_rows`: whether the rows that are trained on were read too."""
        if self._manifest is None:
            return
        recorded = self._manifest["data"]["files"]
        files = file_sha256s(self._settings, held_out_only=not all_rows)
        changed = changed_files(recorded if all_rows else {}, files, recorded)
        tokens = {"eval": held_out.tokens_sha256()} if held_out and not changed else {}
        changes = "not the rows of this run's training: they changed, or the recipe names others now"
        for warning in (*(f"{path}: {changes}" for path in changed), changed_tokens(tokens, self._manifest)):
            self._warn_once(warning)

    def _warn_once(self, warning: str) -> None:
        if warning and warning not in self._warned:
            self._progress.warn(warning)
        self._warned.add(warning)


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
    mean, devices = report.tokens / max(report.examples, 1), devices_of(machine, world_size())
    recipe, settled = resolve_auto(
        recipe, machine, info, report.longest, attentions_of(base), mean, devices, report.examples
    )
    return Prepared(recipe, (*choices, *settled), base, machine, template.tokenizer, rows, report)


def warn_of_tokenizer_differences(base: Base, tokenizer: Any, train: Examples, progress: Progress) -> None:
    """Warn where some of the rows are other tokens than the base's tokenizer.json makes of them."""
    rows = train.rows
    some = range(0, len(rows), max(1, len(rows) // _COMPARED))
    texts = [tokenizer.decode(rows[at]["input_ids"]) for at in some[:_COMPARED]]
    if difference := compare_with_file(base.folder, tokenizer, texts):
        progress.warn(f"model.base: {base.name}: {difference}")


def open_template(recipe: Recipe, progress: Progress) -> tuple[Base, ChatTemplate]:
    """The recipe's base on disk, and its tokenizer with the chat template that the rows are rendered by; UserError
    where either is missing or damaged."""
    quiet_libraries()
    base = resolve_base(recipe.model.base, recipe.model.revision, progress)
    read_model_info(base.folder)  # names a damaged value, over which the tokenizer's loading would stumble otherwise
    check_quantization(base, effective_model(recipe), trains_all(recipe.adapter))
    return base, load_template(recipe, base)


def reopen_run(folder: Path, progress: Progress, base: str | None = None) -> tuple[Run, Prepared]:
    """A finished run with what it was trained from, which must be what it was (UserError). `base` says where its base
    model lies now, where that is another place. Its rows are read when they are needed."""
    run = Run(folder)
    manifest = run.read_manifest()
    if manifest.get("status") != "complete":
        raise UserError(f"{folder}: its training has not ended. Continue it with lorakit train --resume.")
    # What the adapter began from may be gone by now, and a compiler; neither is needed any more.
    loaded = load(run.recipe, ["adapter.from=null", "train.compile=off"], ended=True)
    with loaded.locating(), _base_of_option(base):
        recipe = _relocate(loaded.recipe, run, manifest, base)
        opened, template = open_template(recipe, progress)
        rows = RunRows(recipe.data, template, progress, manifest)
        try:
            report = Report.from_dict(manifest["data"]["train"])
        except (KeyError, TypeError):  # of another version
            report = rows.train.report
        prepared = _settle(
            recipe, opened, template, rows, report, read_model_info(opened.folder), usable_machine(progress)
        )
    refuse_other_base(prepared, manifest, folder)
    files = {run.model / name: recorded for name, recorded in manifest.get("model_sha256", {}).items()}
    keys = {"adapter_model.safetensors": "adapter_sha256", "adapter_config.json": "adapter_config_sha256"}
    for name, key in keys.items():
        if (run.adapter / name).is_file() and key in manifest:
            files[run.adapter / name] = manifest[key]
    for file, recorded in files.items():
        if not file.is_file() or sha256_of(file) != recorded:
            raise UserError(f"{file}: is not what this run trained: its sha256 is not the manifest's.")
    return run, prepared


@contextmanager
def _base_of_option(base: str | None) -> Iterator[None]:
    """An error about a base that --base names says so, instead of where the recipe names its own."""
    try:
        yield
    except BaseModelError as error:
        if base is None:
            raise
        raise UserError(f"--base: {error}") from error


def _relocate(recipe: Recipe, run: Run, manifest: dict[str, Any], base: str | None) -> Recipe:
    """The recipe of a run that may lie elsewhere now: with the base where it is (UserError where nothing is), and with
    the chat template that lies beside what the run trained where its own file is gone. Both are compared later."""
    named, template = recipe.model.base, recipe.model.chat_template
    places = [base] if base else [named, str(manifest["base"].get("name"))]
    place = next((one for one in places if not is_path(one) or Path(one).exists()), None)
    if place is None:
        raise UserError(
            f"{run.folder}: its base model is not at {places[0]}. Put it there, or write where it is now as model.base "
            f"into {run.recipe}."
        )
    if template is not None and not Path(template).exists():
        copies = [folder / "chat_template.jinja" for folder in (run.adapter, run.model)]
        template = next((str(copy) for copy in copies if copy.is_file()), template)
    model = recipe.model.model_copy(update={"base": place, "chat_template": template})
    return recipe.model_copy(update={"model": model})


def refuse_other_base(prepared: Prepared, manifest: dict[str, Any], folder: Path) -> None:
    """Refuse a base whose weights, configuration, tokenizer, or tokens that end an answer are not those that the run in
    `folder` was trained with."""
    base, recorded = prepared.base, manifest["base"]
    before, current = recorded["sha256"], base.sha256()
    names = [name for name in sorted({*before, *current}) if name.endswith(".safetensors") or name == "config.json"]
    if changed := [name for name in names if before.get(name) != current.get(name)]:
        raise UserError(
            f"{folder}: was trained on other weights or another configuration of {base.name} than those found now "
            f"({base.origin}): {', '.join(changed[:3])} differ. The run says: {recorded.get('origin')}."
        )
    if tokenizer_sha256(prepared.tokenizer) != manifest.get("tokenizer_sha256"):
        raise UserError(f"{folder}: the tokenizer of {base.name} or its chat template changed since it was trained.")
    stops = stop_token_ids(base, prepared.tokenizer)
    if recorded.get("stop_token_ids") not in (None, stops):
        raise UserError(
            f"{folder}: was trained with the tokens {recorded['stop_token_ids']} as the ends of an answer, and "
            f"{base.name} names {stops} now (eos_token_id in generation_config.json or config.json). Put the files "
            "back as they were."
        )


def data_of_file(file: Path, like: Data | None, positions: Positions | None) -> Data:
    """The data section of `--data FILE`: like that of a recipe, or rows up to the end of the model's positions."""
    if not file.exists() and not is_pattern(file):
        raise UserError(f"--data: {file}: there is no such file.")
    if like is None:
        like = Data(train="-", max_length=max(positions.limit if positions else 1024, 8))
    return like.model_copy(update={"train": str(file.absolute()), "eval": None})


def changed_files(recorded: dict[str, str], files: dict[str, str], known: dict[str, str] | None = None) -> list[str]:
    """The files of rows whose content is not among those that a run recorded, and those that it recorded whose content
    is gone. A file that was moved or renamed is the same. `known`: what is recorded in all, where that is more."""
    current, before = set(files.values()), set((recorded if known is None else known).values())
    other = {path for path, sha in files.items() if sha not in before}
    return sorted(other | {path for path, sha in recorded.items() if sha not in current})


def changed_tokens(sha256s: Mapping[str, str | None], manifest: dict[str, Any]) -> str:
    """In words, that the same rows become other tokens than when the run began, and what else changed since; empty
    where they do not. `sha256s`: of each side's tokens."""
    recorded = manifest["data"].get("tokens_sha256")
    names = {"train": "training", "eval": "held-out"}
    sides = [names[side] for side in sha256s if recorded is not None and recorded.get(side) != sha256s[side]]
    if not sides:
        return ""
    changed = changed_versions(manifest)
    return f"the {' and '.join(sides)} rows become other tokens than when the run began" + (changed and f" ({changed})")


def changed_versions(manifest: dict[str, Any]) -> str:
    """The packages whose versions are others than when the run began, in words."""
    then, now = manifest.get("versions", {}), versions()
    changed = (f"{name} {then[name]} then, {now.get(name)} now" for name in then if then[name] != now.get(name))
    return "; ".join(changed)
