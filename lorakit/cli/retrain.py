"""`lorakit retrain`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.devices import on_devices, terminal_of_first
from lorakit.cli.eval import open_models, results_folder
from lorakit.cli.options import BaseOption, Devices, Json, Overrides, Quiet, RowColumns, RowFormat, given_rows, quoted
from lorakit.cli.report import refresh_report
from lorakit.cli.train import is_whole, refuse_failed_exports, train_and_export
from lorakit.cli.train_report import describe_run, plan_facts
from lorakit.errors import LorakitError, UserError

if TYPE_CHECKING:
    from lorakit.evaluate.gate import Gate
    from lorakit.progress import Progress
    from lorakit.recipe.load import LoadedRecipe
    from lorakit.share.retrain import NewRecipe, Retraining


def retrain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="New rows: a file, a folder or a pattern.", show_default=False),
    ],
    row_format: RowFormat = None,
    columns: RowColumns = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The new run's folder; by default RUN-2, RUN-3, ... beside RUN."
        ),
    ] = None,
    start: Annotated[
        Literal["base", "adapter"],
        typer.Option("--from", help="Begin afresh from the base model, or go on from what the run trained."),
    ] = "base",
    only_new: Annotated[bool, typer.Option("--only-new", help="Train on the new rows alone, without the old ones.")] = (
        False
    ),
    held_out: Annotated[
        float | None,
        typer.Option(
            "--held-out",
            metavar="SHARE",
            min=0,
            max=0.99,
            help="The share of the new rows to hold out, 0 for none; by default the recipe's, or as many as it takes.",
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    base: BaseOption = None,
    fail_if_worse: Annotated[
        bool,
        typer.Option(
            "--fail-if-worse",
            help="Exit with 1 where the 95 % interval says that the new run is worse on one of the two held-out sets.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a retraining that was cut short.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the new recipe and what would be trained, and stop.")
    ] = False,
    devices: Devices = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a run again with new rows, into a new folder, and compare the two on both held-out sets.

    The recipe is the run's own, with the new rows beside the old ones. What it held out stays held out; of the new
    rows a share is held out as well, by what they say. The old run stays as it is. [cyan]lorakit train
    DIR/recipe.yaml[/cyan] repeats the new one.
    """
    from lorakit import console
    from lorakit.run_dir import Run

    given = given_rows(data, row_format, columns)
    assert given is not None
    Run(run).read_manifest()
    with on_devices(devices, lambda: _batch_size(run), lambda: "The same command with --resume goes on.", not dry_run):
        from lorakit.distributed.processes import is_first, on_first, together
        from lorakit.share.retrain import Retraining, describe_beginning, next_folder, refuse_folder
        from lorakit.train.checkpoint import resumed_recipe

        progress = terminal_of_first(quiet)
        folder = on_first(lambda: output or next_folder(Run(run), resume))
        task = Retraining(Run(run), given, folder, start, only_new, held_out, base)
        on_first(lambda: refuse_folder(task, resume))
        progress.say(describe_beginning(task))
        composed, loaded = _load(task, overrides, progress)
        if dry_run:
            _dry_run(loaded, as_json, progress)
            return
        facts: dict[str, Any] = {"run": str(folder)}
        if resume and on_first(lambda: is_whole(Run(folder), loaded)):
            on_first(lambda: resumed_recipe(Run(folder), loaded))  # refuses what another retraining has trained
            progress.say(f"the training has ended; the two are compared: {folder}")
        else:
            facts = train_and_export(loaded, resume, False, as_json, progress)
            together(lambda: None)  # until the first process has left the folder
        gates, path = _compare(task, composed, as_json, progress)
        if not is_first():
            return
    if as_json:
        compared = {
            "against": str(run),
            "recipe": str(Run(folder).recipe),
            "compared": [gate.to_dict() for gate in gates],
        }
        console.result_json({**facts, **compared, "file": path})
    refuse_failed_exports(facts)
    if fail_if_worse and (worse := [failure for gate in gates for failure in gate.failures]):
        raise LorakitError(f"--fail-if-worse: {'; '.join(worse)}.")


def _batch_size(run: Path) -> int:
    from lorakit.recipe.load import load
    from lorakit.run_dir import Run

    return load(Run(run).recipe, ended=True).recipe.train.batch_size


def _load(task: "Retraining", overrides: list[str], progress: "Progress") -> "tuple[NewRecipe, LoadedRecipe]":
    """The recipe of the new run, which is not in its folder yet."""
    from lorakit.distributed.processes import on_first
    from lorakit.recipe.load import load
    from lorakit.run_dir import Run
    from lorakit.share.held_out_sets import refuse_trained_rows
    from lorakit.share.retrain import compose_recipe

    composed = on_first(lambda: compose_recipe(task, progress))
    for note in composed.notes:
        progress.say(note)
    loaded = load(Run(task.output).recipe, overrides, text=composed.text)
    if Path(str(loaded.recipe.output.dir)) != task.output:
        raise UserError("--set output.dir: the folder of the new run is that of --output. Write --output DIR.")
    run = Run(task.run.folder.resolve())
    with loaded.locating():
        on_first(lambda: refuse_trained_rows(run, loaded.recipe, composed.old_sources, task.base, progress))
    return composed, loaded


def _dry_run(loaded: "LoadedRecipe", as_json: bool, progress: "Progress") -> None:
    """Print the recipe as it would be in the new run's folder, and what would be trained."""
    from lorakit import console
    from lorakit.distributed.processes import is_first
    from lorakit.prepare import prepare_run
    from lorakit.recipe.to_yaml import dump_yaml, plain_recipe

    with loaded.locating():
        prepared = prepare_run(loaded.recipe, progress)
    if not is_first():
        return
    describe_run(prepared, progress)
    facts, recipe = plan_facts(prepared, progress), plain_recipe(loaded.recipe, loaded.path.parent)
    if as_json:
        console.result_json({"recipe": recipe, **facts})
    else:
        console.result(f"# {loaded.path}\n{dump_yaml(recipe)}")


def _compare(
    task: "Retraining", composed: "NewRecipe", as_json: bool, progress: "Progress"
) -> "tuple[list[Gate], str | None]":
    """The new run against the old one on the held-out rows of each, and the file of the scores."""
    from lorakit import console
    from lorakit.distributed.processes import is_first
    from lorakit.evaluate.report import gate_table, score_table, write_evaluation
    from lorakit.evaluate.run import EvalSettings, default_settings, score_models
    from lorakit.share.held_out_sets import compare_held_out

    new, old = task.output, task.run.folder
    with open_models([str(new)], None, progress, base=task.base, reference=str(old)) as models:
        if models.prepared is None or models.prepared.recipe.data.eval is None:
            progress.warn("no held-out rows: the two are not compared. lorakit eval with --data FILE compares them")
            return [], None
        recipe = default_settings(models.prepared)
        settings = EvalSettings(
            recipe.metrics, recipe.max_new_tokens, baseline=models.specs[1].name, turns=recipe.turns
        )
        evaluation = score_models(models, None, settings, progress)
        if not is_first():
            return [], None
        gates = compare_held_out(evaluation, composed.old_sources, progress)
        folder = results_folder(models, None)
        assert folder is not None
        path = write_evaluation(evaluation, folder, {"gates": [gate.to_dict() for gate in gates]})
        if models.run:
            refresh_report(models.run, progress)
    if not as_json:
        console.result_table(*score_table(evaluation.rows_used, evaluation.parts[""].scores))
        for gate in gates:
            console.result_table(*gate_table(gate))
        console.result(f"every answer: {path.with_suffix('.jsonl')}")
        console.result(f"next: lorakit eval {quoted(new)} --not-worse-than {quoted(old)}")
    return gates, str(path)
