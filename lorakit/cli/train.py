"""`lorakit train`"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.amounts import counted
from lorakit.cli.devices import on_devices, terminal_of_first
from lorakit.cli.options import Devices, Json, Overrides, Quiet, RecipePath, quoted
from lorakit.cli.report import refresh_report
from lorakit.cli.train_report import describe_run, plan_facts, print_first_example, print_outcome
from lorakit.errors import LorakitError, UserError

if TYPE_CHECKING:
    from lorakit.prepare import Prepared
    from lorakit.progress import Progress
    from lorakit.recipe.export_target import ExportTarget
    from lorakit.recipe.load import LoadedRecipe
    from lorakit.run_dir import Run
    from lorakit.train.run import Outcome


def train(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The run's folder, instead of output.dir.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the results that the run's folder holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the data, find the model, print what would be trained, and stop.")
    ] = False,
    locked: Annotated[
        bool,
        typer.Option(
            "--locked",
            help="Refuse what differs from NAME.lock.yaml, which [cyan]lorakit lock[/cyan] wrote. With the folder of "
            "a run as RECIPE, train its recipe.yaml, and refuse what differs from its manifest.",
        ),
    ] = False,
    devices: Devices = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter from a recipe.

    The run's folder gets the adapter, checkpoints, the log, the resolved recipe and a manifest. Ctrl-C writes a
    checkpoint and exits with 130; [cyan]--resume[/cyan] goes on from there to the same result.
    """
    from lorakit.recipe.load import load

    if locked and recipe.is_dir():
        recipe = _recipe_of_run(recipe)
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other.")
    if output is not None:
        overrides = [*overrides, f"output.dir={json.dumps(str(output))}"]

    @cache
    def loaded() -> "LoadedRecipe":
        from lorakit.recipe.export_target import parse_target, refuse_missing_modules
        from lorakit.track.tracking import refuse_missing_trackers

        checked = load(recipe, overrides)
        with checked.locating():
            refuse_missing_modules([parse_target(word) for word in checked.recipe.output.export], "output.export")
            refuse_missing_trackers(checked.recipe.track)
        return checked

    with on_devices(devices, lambda: _most_devices(loaded()), lambda: _go_on(loaded()), starts=not dry_run):
        if locked:
            _refuse_differences(loaded(), quiet)
        if dry_run:
            _dry_run(loaded(), as_json, quiet)
        else:
            _run(loaded(), resume, overwrite, as_json, quiet)


def _most_devices(loaded: "LoadedRecipe") -> int | None:
    """How many devices have a row of each step; None where that is known once the rows are read."""
    train = loaded.recipe.train
    return train.batch_size if train.batch_tokens is None else None


def _go_on(loaded: "LoadedRecipe") -> str:
    """What to do after the run was cut short."""
    from lorakit.run_dir import Run

    written = Run(Path(str(loaded.recipe.output.dir))).complete_checkpoints()
    if not written:
        return "No checkpoint was written yet: start again with --overwrite."
    return f"Every checkpoint is complete: --resume goes on from {written[-1].name}."


def _recipe_of_run(folder: Path) -> Path:
    from lorakit.run_dir import Run

    run = Run(folder)
    run.read_manifest()
    return run.recipe


def _refuse_differences(loaded: "LoadedRecipe", quiet: bool) -> None:
    """Each machine looks at what it has."""
    from lorakit.distributed.processes import is_first_of_node, together
    from lorakit.share.lock import refuse_differences

    progress = terminal_of_first(quiet)
    together(lambda: refuse_differences(loaded, progress) if is_first_of_node() else None)


def _dry_run(loaded: "LoadedRecipe", as_json: bool, quiet: bool) -> None:
    from lorakit import console
    from lorakit.distributed.processes import is_first
    from lorakit.prepare import prepare_run

    progress = terminal_of_first(quiet)
    with loaded.locating():
        prepared = prepare_run(loaded.recipe, progress)
    if is_first():
        describe_run(prepared, progress)
        facts = plan_facts(prepared, progress)
        if as_json:
            console.result_json(facts)
        else:
            print_first_example(prepared)


@contextmanager
def _opened(loaded: "LoadedRecipe", resume: bool, overwrite: bool) -> Iterator["Run"]:
    """The run's folder, held by the first process for all of them."""
    from lorakit.distributed.processes import is_first, together
    from lorakit.run_dir import Run, missing_run, open_run

    folder = Path(str(loaded.recipe.output.dir))

    def open_folder() -> "Run":
        if not is_first():
            return Run(folder)
        if resume and not (Run(folder).recipe.is_file() or Run(folder).manifest.exists()):
            raise missing_run(folder)  # a new one would begin in a place that may be a typing error
        if overwrite:
            _refuse_inputs_inside(folder, loaded)
        return stack.enter_context(open_run(folder, resume, overwrite))

    with ExitStack() as stack:
        yield together(open_folder)


def _run(loaded: "LoadedRecipe", resume: bool, overwrite: bool, as_json: bool, quiet: bool) -> None:
    from lorakit import console
    from lorakit.distributed.processes import is_first

    facts = train_and_export(loaded, resume, overwrite, as_json, terminal_of_first(quiet))
    if as_json and is_first():
        console.result_json(facts)
    refuse_failed_exports(facts)


def train_and_export(
    loaded: "LoadedRecipe", resume: bool, overwrite: bool, as_json: bool, progress: "Progress"
) -> dict[str, Any]:
    """Train, merge and export, and print what came of it unless it is `as_json`; the facts of it. Exports are the first
    process's alone, which their failures do not end."""
    from lorakit.distributed.processes import alone, is_first
    from lorakit.recipe.adapter_kind import trains_all
    from lorakit.recipe.export_target import parse_target

    targets = [parse_target(word) for word in loaded.recipe.output.export]
    with _opened(loaded, resume, overwrite) as run:
        outcome, prepared = _train(run, loaded, resume, progress)
        whole = trains_all(prepared.recipe.adapter)
        facts: dict[str, Any] = {"run": str(run.folder)}
        facts |= {"model": str(run.model)} if whole else {"adapter": str(run.adapter)}
        if is_first() and not as_json:
            print_outcome(outcome, run, prepared, whole)
        if loaded.recipe.output.merged:
            facts |= _merge(run, prepared, progress)
        if is_first():
            with alone():
                facts |= _export(run, targets, prepared, progress) if targets else {}
            refresh_report(run, progress)
    return {**facts, **outcome.__dict__}


def refuse_failed_exports(facts: dict[str, Any]) -> None:
    """End with exit code 1 where an export failed."""
    if failures := facts.get("failed_exports"):
        raise LorakitError(f"the training is complete, and {counted(failures, 'export')} failed, as said above.")


def _merge(run: "Run", prepared: "Prepared", progress: "Progress") -> dict[str, Any]:
    """Merge, where that was not done before, and return the facts of it."""
    from lorakit.distributed.processes import alone, any_of, is_first, on_first
    from lorakit.distributed.sharing import opened_by_first
    from lorakit.merge.inputs import input_of_run
    from lorakit.merge.run import merge
    from lorakit.output_dir import claim_output

    if on_first(run.merged.exists):
        return {}
    first = is_first()
    if any_of(not run.manifest.is_file()) == (True,):  # the folder is not on a file system that all machines see
        with alone():
            return _merge(run, prepared, progress) if first else {}
    with opened_by_first(lambda: claim_output(run.merged, overwrite=True)):
        facts = merge(input_of_run(run, prepared, progress), run.merged, progress).facts()
    progress.say(f"merged model: {run.merged}")
    return facts


def _train(run: "Run", loaded: "LoadedRecipe", resume: bool, progress: "Progress") -> "tuple[Outcome, Prepared]":
    """Train, or go on from the last checkpoint; a finished run that lacks only its merge or an export is reopened."""
    from lorakit.distributed.processes import is_first, on_first, together
    from lorakit.prepare import prepare_run, reopen_run
    from lorakit.train.checkpoint import checkpoint_to_resume, resumed_recipe
    from lorakit.train.run import Outcome
    from lorakit.train.run import train as train_run

    recipe = on_first(lambda: resumed_recipe(run, loaded)) if resume else loaded.recipe
    missing = on_first(lambda: _missing_outputs(run, loaded) if resume and run.is_complete() else [])
    if missing:
        progress.say(f"the training has ended; only this is missing: {', '.join(missing)}")
        option = "--base of lorakit merge or lorakit export"  # training has none
        _, prepared = together(lambda: reopen_run(run.folder, progress, option=option))
        return Outcome(**run.read_manifest()["result"]), prepared
    with loaded.locating():
        prepared = prepare_run(recipe, progress)
    if is_first():
        describe_run(prepared, progress)
    checkpoint = on_first(lambda: checkpoint_to_resume(run, prepared, progress)) if resume else None
    together(lambda: _refuse_unseen(checkpoint))
    with loaded.locating():
        return train_run(prepared, run, progress, checkpoint), prepared


def _refuse_unseen(checkpoint: Path | None) -> None:
    """Of several machines all read the checkpoint."""
    if checkpoint and not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}: not on every machine. Put the run's folder where all machines see it (--output)."
        )


def is_whole(run: "Run", loaded: "LoadedRecipe") -> bool:
    """Whether a run has ended with all that its recipe says it writes."""
    return run.is_complete() and not _missing_outputs(run, loaded)


def _missing_outputs(run: "Run", loaded: "LoadedRecipe") -> list[str]:
    """What a finished run was to have beside its adapter and has not."""
    from lorakit.recipe.export_target import parse_target

    merged = ["the merged model"] if loaded.recipe.output.merged and not run.merged.exists() else []
    targets = [parse_target(word) for word in loaded.recipe.output.export]
    return merged + [str(target) for target in targets if not (run.exports / target.folder_name).exists()]


def _export(run: "Run", targets: "list[ExportTarget]", prepared: "Prepared", progress: "Progress") -> dict[str, Any]:
    """Each target that is not there yet, as JSON, and how many failed: the others and the training are not lost."""
    from lorakit.cli.export import source_of_run
    from lorakit.export.run import export

    results, failures = [], 0
    missing = [target for target in targets if not (run.exports / target.folder_name).exists()]
    source = source_of_run(run, prepared, None, progress) if missing else None
    for target in missing:
        try:
            assert source is not None
            (result,) = export(source, [target], run.exports, False, progress)
        except LorakitError as error:
            failures += 1
            again = f"lorakit export {quoted(run.folder)} --to {target}"
            progress.warn(f"{target} was not exported: {error} The training is complete; {again} tries again")
        else:
            results.append(result.facts())
            progress.say(f"exported: {result.folder}")
    return {"exports": results, "failed_exports": failures}


def _refuse_inputs_inside(folder: Path, loaded: "LoadedRecipe") -> None:
    """Overwriting a run must not delete what the new one is made from."""
    from lorakit.recipe.paths import input_paths
    from lorakit.run_dir import Run

    parts = [part.resolve() for part in Run(folder).results()]
    for path in sorted({*loaded.files, *input_paths(loaded.recipe)}):
        if any(path.resolve().is_relative_to(part) for part in parts):
            raise UserError(f"{path}: lies inside {folder}, which --overwrite would clear. Copy it elsewhere first.")
