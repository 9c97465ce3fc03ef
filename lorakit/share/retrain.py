"""Training a run again: its recipe with new rows beside the old ones, or instead of them. What was held out stays held
out, and the new rows get held-out rows of their own."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lorakit.atomic_io import atomic_dir, sha256_of
from lorakit.atomic_io import files_in as names_in
from lorakit.data.examples import file_sha256s
from lorakit.data.readers import files_in
from lorakit.data.sources import is_file, sources_of
from lorakit.errors import UserError
from lorakit.plan.auto import with_values
from lorakit.prepare import GivenRows, Prepared, reopen_run
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import effective_model, initial_adapter, trains_all
from lorakit.recipe.data_files import is_pattern
from lorakit.recipe.fields import is_split
from lorakit.recipe.load import load, to_yaml
from lorakit.recipe.paths import is_path
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Source
from lorakit.run_dir import Run
from lorakit.run_inputs import MissingRows, changed_files, locate_sources
from lorakit.share.packed_rows import write_held_out
from lorakit.share.row_diff import compare_rows
from lorakit.share.row_shape import held_out_share
from lorakit.share.scores import value_at

# Where the run left them to `auto` they are chosen anew: they are of its machine, and change speed and memory alone.
_OF_MACHINE = ("model.attention", "data.packing", "train.micro_batch", "train.gradient_checkpointing", "train.kernels",
               "train.compile", "train.sharding")  # fmt: skip


@dataclass(frozen=True)
class Retraining:
    """A run to train again, into the new folder `output`. `rows`: the new ones, of which a share is `held_out` (None:
    as many as tell models apart); `only_new`: whether the old ones are left out; `start`: what the training begins
    with; `base`: where the base model is now."""

    run: Run
    rows: GivenRows
    output: Path
    start: Literal["base", "adapter"] = "base"
    only_new: bool = False
    held_out: float | None = None
    base: str | None = None


@dataclass(frozen=True)
class NewRecipe:
    """The text of a recipe in the folder of the new run. Of the sources of its held-out rows the first `old_sources`
    are the old run's. `notes`: what is to be said of it."""

    text: str
    old_sources: int
    notes: tuple[str, ...]


def compose_recipe(task: Retraining, progress: Progress) -> NewRecipe:
    """The recipe by which a run is trained again: its own, with every `auto` as it was settled but for those of the
    machine. Held-out rows that are a share of rows that are left out are written below the new folder. UserError where
    the run has not ended, or its base, its held-out or its old rows are not here."""
    run, prepared = reopen_run(task.run.folder.resolve(), progress, task.base)
    manifest, recipe = run.read_manifest(), load(run.recipe, ended=True).recipe
    data, old_sources, notes = _Rows(task, run, recipe.data, prepared, manifest, progress).section()
    model, adapter = _beginning(task, run, recipe, prepared)
    folder = task.output
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().name).strip("._-") or recipe.name
    output = recipe.output.model_copy(update={"dir": str(folder)})
    parts = {"name": name, "model": model, "adapter": adapter, "data": data, "output": output}
    recorded = manifest.get("auto")
    auto = {value_at(one, "path") for one in recorded} if isinstance(recorded, list) else set()
    changed = with_values(recipe.model_copy(update=parts), {key: "auto" for key in _OF_MACHINE if key in auto})
    return NewRecipe(to_yaml(changed, folder), old_sources, tuple(notes))


def _beginning(task: Retraining, run: Run, recipe: Recipe, prepared: Prepared) -> tuple[Model, Adapter]:
    """The sections of the model, where its base and template are now, and of the adapter that training begins with."""
    located, adapter = prepared.recipe.model, recipe.adapter
    is_folder = located.base == task.base and Path(located.base).exists()
    base = str(Path(located.base).absolute()) if is_folder else located.base
    update: dict[str, Any] = {"base": base, "chat_template": located.chat_template}
    if prepared.base.commit and not is_path(base):
        update["revision"] = prepared.base.commit
    if task.start == "adapter" and trains_all(adapter):
        update |= {"base": str(run.model), "revision": "main", "add_tokens": []}  # which it has by now
    elif not prepared.has_base:
        raise UserError(
            f"{run.folder}: its base model is not here. Write --base with its place, or go on from what it trained: "
            "--from adapter."
        )
    elif task.start == "adapter":
        settings = {"from": str(run.folder), "dropout": adapter.dropout}
        update["quantization"] = effective_model(recipe).quantization
        return recipe.model.model_copy(update=update), Adapter.model_validate(settings)
    return recipe.model.model_copy(update=update), _fresh_adapter(adapter)


def _fresh_adapter(adapter: Adapter) -> Adapter:
    """The section of an adapter that begins anew: of a run that went on from another one that of the first. One that
    began with an adapter of another program begins with it again."""
    source = initial_adapter(adapter)
    while source is not None:
        folders = (Path(source), *Path(source).parents[:2])  # the run, its adapter or one of its checkpoints
        earlier = next((run for run in map(Run, folders) if run.holds_results()), None)
        if earlier is None:
            return adapter
        adapter = load(earlier.recipe, ended=True).recipe.adapter.model_copy(update={"dropout": adapter.dropout})
        source = initial_adapter(adapter)
    return adapter


@dataclass(frozen=True)
class _Rows:
    """The rows of a run, `data` as its recipe has them, and the new ones."""

    task: Retraining
    run: Run
    data: Data
    prepared: Prepared
    manifest: Mapping[str, Any]
    progress: Progress

    def section(self) -> tuple[Data, int, list[str]]:
        """The data section with the new rows, how many sources of its held-out rows are old, and what is to be said.

        A share of all rows goes on holding out what it held out: rows are told apart by what they say, and those that
        come later change nothing before them. Where the held-out rows have a source of their own, so have the new
        ones': a share of them by content, and `clean.leakage: fix` takes what is held out out of the training."""
        task, written = self.task, self.data.eval
        old = self._old_sources()
        new = self._new_source(old)
        training = [*old, new]
        rows, notes = self._count(old, new)
        if isinstance(written, float) and not task.only_new:  # a number of rows would be others with new ones
            if task.held_out not in (None, written):
                reason = f"the recipe holds out a share of all rows (data.eval: {written:g}), of the new ones too"
                raise UserError(
                    f"--held-out: {reason}. Leave it out, or set data.eval, which changes what is held out."
                )
            return self.data.model_copy(update={"train": _as_written(training)}), len(old), notes
        held_out, clean = self._old_held_out()
        share = held_out_share(rows) if task.held_out is None else task.held_out or None
        if share is None and task.held_out is None:
            few = (
                f"none of the {rows:,} new rows is held out, since they are few: nothing says how well they are learned"
            )
            notes.append(f"{few}. --held-out 0.3 holds three of ten out")
        newer = [] if share is None else [new.model_copy(update={"take": share})]
        clean = clean.model_copy(update={"leakage": "fix"}) if held_out or newer else clean
        section = {"train": _as_written(training), "eval": _as_written([*held_out, *newer]) or None, "clean": clean}
        return self.data.model_copy(update=section), len(held_out), notes

    def _old_sources(self) -> list[Source]:
        """The sources of the old training rows, where they are now; none where they are left out."""
        if self.task.only_new:
            return []
        recorded = self.manifest["data"]["files"]
        try:
            located = locate_sources(self.data.train, self.run.folder, recorded)
        except MissingRows as error:
            more = "" if self.task.start == "adapter" else " --from adapter"
            remedy = f"Put them back, or train on the new rows alone: --only-new{more}."
            raise UserError(f"{self.run.folder}: its training rows are not here: {error} {remedy}") from error
        section = self.data.model_copy(update={"train": located, "eval": None})
        for path in changed_files({}, file_sha256s(section), recorded):
            self.progress.warn(
                f"{path}: not the rows of this run's training: they changed. They are read as they are now"
            )
        return _as_sources(located)

    def _new_source(self, old: Sequence[Source]) -> Source:
        """The new rows, read as the old ones are where --format and --columns do not say otherwise."""
        given, path = self.task.rows, self.task.rows.file.absolute()
        if not path.exists() and not is_pattern(path):
            raise UserError(f"--data: {given}: there is no such file.")
        if again := {*files_in(path)} & {file for one in filter(is_file, old) for file in files_in(Path(one.path))}:
            what = f"{show_path(min(again))} is among the rows of the run already"
            raise UserError(f"--data: {what}. Give the new rows in a file of their own.")
        several = _as_sources(self.data.train)
        shared = {
            name: getattr(several[0], name)
            for name in ("format", "columns", "system")
            if all(getattr(one, name) == getattr(several[0], name) for one in several)
        }
        own = {"format": given.format, "columns": given.columns}
        return Source(path=str(path), **(shared | {name: value for name, value in own.items() if value is not None}))

    def _count(self, old: Sequence[Source], new: Source) -> tuple[int, list[str]]:
        """How many new rows there are, and a note where some are among the old ones."""
        section = self.data.model_copy(update={"train": [*filter(is_file, old), new]})
        *readable, last = sources_of(section, section.train)
        difference = compare_rows(readable, [last], self.progress)
        notes = [f"new rows: {difference.rows_b:,} in {show_path(Path(new.path))}"]
        if difference.both:
            notes[0] += f", of which {difference.both:,} are among the old ones and count twice"
            notes[0] += "; --set data.clean.duplicates=fix takes each once"
        return difference.rows_b, notes

    def _old_held_out(self) -> tuple[list[Source], Any]:
        """The sources of the old held-out rows, where they are now, and the section of the checks with which they
        become what they were."""
        written, clean = self.data.eval, self.data.clean
        if written is None:
            return [], clean
        try:
            if is_split(written):
                return self._extracted()
            return _as_sources(locate_sources(written, self.run.folder, self.manifest["data"]["files"])), clean
        except MissingRows as error:
            if not self.task.only_new:
                what = "its held-out rows are not here, without which they could be trained on"
                raise UserError(f"{self.run.folder}: {what}: {error} Put them back.") from error
            self.progress.warn(
                f"{self.run.folder}: its held-out rows are not here, so only new ones are scored: {error}"
            )
            return [], clean

    def _extracted(self) -> tuple[list[Source], Any]:
        """Held-out rows that are a share of rows that are left out, written below the new folder."""
        rows, names = Run(self.task.output).rows, list[str]()
        remedy = "Train on the old rows too: leave --only-new out."
        with TemporaryDirectory(prefix="lorakit-retrain.") as scratch:
            section, files = write_held_out(self.run, self.prepared, self.manifest, Path(scratch), remedy)
            names = [name.removeprefix("rows/") for name in files]
            if rows.exists():
                if names_in(rows) != sorted(names) or any(
                    sha256_of(rows / name) != sha256_of(Path(scratch) / "rows" / name) for name in names
                ):
                    raise UserError(f"{rows}: holds other files. Choose another folder with --output.")
            else:
                rows.parent.mkdir(parents=True, exist_ok=True)
                with atomic_dir(rows) as draft:
                    shutil.copytree(Path(scratch) / "rows", draft, dirs_exist_ok=True)
        places = [str(rows.absolute() / name) for name in names]
        pairs = zip(_as_sources(section.eval), places, strict=True)
        sources = [one.model_copy(update={"path": place}) for one, place in pairs]
        own = {name: getattr(self.data.clean, name) for name in ("duplicates", "near_duplicates")}
        return sources, section.clean.model_copy(update=own)


def _as_sources(written: Any) -> list[Source]:
    """`data.train` or `data.eval` as a list of sources, each as it is written."""
    several = written if isinstance(written, list) else [written]
    return [one if isinstance(one, Source) else Source(path=one) for one in several]


def _as_written(sources: Sequence[Source]) -> list[str | Source]:
    """The sources as a person writes them: a path where there is nothing else to say."""
    return [one.path if one == Source(path=one.path) else one for one in sources]


def describe_beginning(task: Retraining) -> str:
    """What is trained, in one line."""
    rows = "the new rows alone" if task.only_new else "the old and the new rows"
    begins = "going on from what it trained" if task.start == "adapter" else "afresh from its base"
    return f"retraining {show_path(task.run.folder)} on {rows}, {begins}, into {show_path(task.output)}"


def next_folder(run: Run, resume: bool) -> Path:
    """The folder of a new run beside another one: NAME-2, NAME-3, ...; to `resume`, the last one that is there."""
    folder = run.folder.resolve()
    stem, number = re.sub(r"-\d{1,4}$", "", folder.name), 2
    while (beside := folder.with_name(f"{stem}-{number}")).exists() and not Run(beside).is_vacant():
        number += 1
    if resume and number == 2:
        raise UserError(f"--resume: there is no {stem}-2 beside {run.folder}. Name the run's folder with --output.")
    target = folder.with_name(f"{stem}-{number - resume}")
    shown = Path(show_path(target))
    return shown if shown.absolute() == target else target


def refuse_folder(task: Retraining, resume: bool) -> None:
    """Refuse a folder that is the old run's, holds another run, or has nothing to resume (UserError)."""
    new, name = Run(task.output), show_path(task.output)
    if task.output.resolve() == task.run.folder.resolve():
        raise UserError(f"--output: {name} is the run that is trained again. It stays as it is: choose another folder.")
    if new.holds_results() and not resume:
        raise UserError(f"{name}: holds another run's results. Continue it with --resume, or choose another --output.")
    if resume and not new.holds_results():
        raise UserError(f"--resume: {name} holds no run that began. Leave --resume out.")
