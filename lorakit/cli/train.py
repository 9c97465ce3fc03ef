"""`lorakit train`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.amounts import counted, duration, gibibytes, percent
from lorakit.cli.options import Json, Overrides, Quiet, RecipePath
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.hardware.machine import Machine
    from lorakit.merge.card import MergeResult
    from lorakit.plan.memory import Memory
    from lorakit.prepare import Prepared
    from lorakit.progress import Progress
    from lorakit.recipe.load import LoadedRecipe
    from lorakit.run_dir import Run
    from lorakit.train.run import Outcome

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the results that the run's folder holds.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="The run's folder, instead of output.dir.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read the data, find the model, print what would be trained, and stop.")
]


def train(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter from a recipe.

    The run's folder gets the adapter, checkpoints, the log, the resolved recipe and a manifest. Ctrl-C writes a
    checkpoint and exits with 130; [cyan]--resume[/cyan] goes on from there to the same result.
    """
    from lorakit import console

    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other.")
    progress = console.Terminal(quiet)
    from lorakit.recipe.load import load

    if output is not None:
        overrides = [*overrides, f"output.dir={json_text(str(output))}"]
    loaded = load(recipe, overrides)
    from lorakit.prepare import prepare_run
    from lorakit.run_dir import Run, open_run
    from lorakit.train.resume import require_started_run

    folder = Path(str(loaded.recipe.output.dir))
    if dry_run:
        with loaded.locating():
            prepared = prepare_run(loaded.recipe, progress)
        _describe(prepared, progress)
        _print_plan(prepared, as_json, progress)
        return
    if resume:
        require_started_run(Run(folder))
    if overwrite:
        _refuse_inputs_inside(folder, loaded)
    with open_run(folder, resume, overwrite) as run:
        outcome, prepared = _trained(run, loaded, resume, progress)
        if not as_json:
            _report(outcome, run, prepared)
        merged = None
        if loaded.recipe.output.merged:
            from lorakit.merge.inputs import input_of_run
            from lorakit.merge.run import claim_output, merge

            with claim_output(run.merged, overwrite=True):
                merged = merge(input_of_run(run, prepared, progress), run.merged, progress)
            progress.say(f"merged model: {run.merged}")
    if as_json:
        _report_json(outcome, run, prepared, merged)


def _trained(run: "Run", loaded: "LoadedRecipe", resume: bool, progress: "Progress") -> "tuple[Outcome, Prepared]":
    """The run, trained to its end: from the start, from its last checkpoint, or long ago where only a merge is missing.

    Raises:
        UserError: the recipe cannot be trained, or the run has ended and nothing is missing.
    """
    from lorakit.prepare import prepare_run, reopen_run
    from lorakit.train.resume import checkpoint_to_resume, resumed_recipe
    from lorakit.train.run import Outcome
    from lorakit.train.run import train as train_run

    if resume and loaded.recipe.output.merged and run.is_complete() and not run.merged.exists():
        resumed_recipe(run, loaded)  # refuses another one
        progress.say("the training has ended; what is missing is the merged model")
        _, prepared = reopen_run(run.folder, progress)
        return Outcome(**run.read_manifest()["result"]), prepared
    settled = resumed_recipe(run, loaded) if resume else loaded.recipe
    with loaded.locating():
        prepared = prepare_run(settled, progress)
    _describe(prepared, progress)
    checkpoint = checkpoint_to_resume(run, prepared, progress) if resume else None
    with loaded.locating():
        return train_run(prepared, run, progress, checkpoint), prepared


def json_text(text: str) -> str:
    """A value of `--set` that YAML reads as exactly this text."""
    import json

    return json.dumps(text)


def _describe(prepared: "Prepared", progress: "Progress") -> None:
    """Say what was chosen and what was read, before anything long begins."""
    from lorakit.cli.draws import count_draws
    from lorakit.plan.schedule import describe_schedule

    for choice in prepared.choices:
        progress.say(str(choice))
    for name, examples in (("train", prepared.train), ("held-out", prepared.held_out)):
        if examples is None:
            continue
        report = examples.report
        progress.say(
            f"{name}: {report.used:,} of {report.read:,} rows, {report.tokens:,} tokens, {report.trained_tokens:,} of "
            f"them trained, longest row {report.longest}; {'; '.join(map(str, report.sources))}"
        )
        for note, count in report.notes.items():
            progress.say(f"{name}: {count:,} rows: {note}")
        if report.several:
            progress.say(f"{name}: {report.examples:,} examples, several of each of {report.several:,} rows")
        if report.passed_over:
            progress.say(f"{name}: {report.passed_over:,} rows passed over by take")
        if report.cut:
            progress.warn(f"{name}: {report.cut:,} rows cut to {prepared.recipe.data.max_length} tokens")
        for reason, count in report.dropped.counts.items():
            progress.warn(f"{name}: {count:,} rows dropped: {reason} (first: {report.dropped.first[reason][0]})")
        for reason, count in report.findings.counts.items():
            progress.warn(f"{name}: {count:,} x {reason} (first: {report.findings.first[reason][0]})")
    if prepared.held_out is None:
        progress.warn(
            "no held-out rows (data.eval): no held-out loss is measured, the last adapter is kept whether or not it is "
            "the best, nothing stops early, and lorakit eval has no rows of its own. data.eval: 0.1 holds a tenth out"
        )
    if prepared.expected:
        _tell_memory(prepared.expected, prepared.machine, progress)
    for drawn in count_draws(prepared.train, prepared.recipe.train):
        if drawn.source.weight != 1:
            progress.say(str(drawn))
        if drawn.warning:
            progress.warn(drawn.warning)
    for line in describe_schedule(prepared.recipe.train, prepared.steps, prepared.held_out is not None):
        progress.say(line)


def _tell_memory(expected: "Memory", machine: "Machine", progress: "Progress") -> None:
    from lorakit.plan.estimate import ERROR
    from lorakit.plan.fit import memory_budget

    held = f"{gibibytes(machine.memory)} {'on the card' if machine.is_gpu else 'free'}"
    said = f"memory: the longest micro-batch is predicted to take {gibibytes(expected.total)} of {held}"
    if expected.total > memory_budget(machine):
        progress.warn(f"{said}: it may run out. lorakit plan says what would fit")
    elif expected.total * (1 + ERROR) > machine.memory:
        progress.say(f"{said}, if the estimate holds: it may be off by {ERROR:.0%}")
    else:
        progress.say(said)


def _refuse_inputs_inside(folder: Path, loaded: "LoadedRecipe") -> None:
    """Overwriting a run must not delete what the new one is made from."""
    from lorakit.recipe.paths import input_paths
    from lorakit.run_dir import Run

    parts = [part.resolve() for part in Run(folder).results()]
    for path in sorted({*loaded.files, *input_paths(loaded.recipe)}):
        if any(path.resolve().is_relative_to(part) for part in parts):
            raise UserError(f"{path}: lies inside {folder}, which --overwrite would clear. Copy it elsewhere first.")


def _print_plan(prepared: "Prepared", as_json: bool, progress: "Progress") -> None:
    """The first example as the model sees it, the trained text in green or between marks; or all facts as JSON."""
    from dataclasses import asdict

    from lorakit import console
    from lorakit.data.explain import split_by_trained
    from lorakit.train.setup import planned_parameters

    counts = planned_parameters(prepared)
    if counts:
        progress.say("trainable parameters: {:,} of {:,} ({})".format(*counts, percent(counts[0] / counts[1], 2)))
    else:
        progress.say("trainable parameters: known when the weights are loaded, by which adapter.layers chooses")
    if as_json:
        held_out = prepared.held_out
        reports = {"train": prepared.train.report.to_dict(), "eval": held_out.report.to_dict() if held_out else None}
        parameters = {"trainable": counts[0], "total": counts[1]} if counts else None
        choices = [asdict(choice) for choice in prepared.choices]
        console.result_json({"steps": prepared.steps, "parameters": parameters, "auto": choices, **reports})
        return
    row = prepared.train.rows[0]
    console.result_masked(
        f"first example, {row['where']}:",
        [
            (prepared.tokenizer.decode(ids), trained)
            for ids, trained in split_by_trained(row["input_ids"], row["labels"])
        ],
    )


def _report_json(outcome: Any, run: Any, prepared: "Prepared", merged: "MergeResult | None") -> None:
    from lorakit import console
    from lorakit.cli.merge import merge_facts
    from lorakit.recipe.adapter_kind import trains_all

    whole = trains_all(prepared.recipe.adapter)
    places: dict[str, Any] = {"model": str(run.model)} if whole else {"adapter": str(run.adapter)}
    if merged:
        places |= merge_facts(merged)
    console.result_json({"run": str(run.folder), **places, **outcome.__dict__})


def _report(outcome: Any, run: Any, prepared: "Prepared") -> None:
    from lorakit import console
    from lorakit.cli.next_commands import next_commands
    from lorakit.recipe.adapter_kind import trains_all

    whole = trains_all(prepared.recipe.adapter)
    lines = [f"trained {counted(outcome.steps, 'step')} in {duration(outcome.seconds)}"]
    if outcome.loss is not None:
        lines[0] += f", last loss {outcome.loss:.4f}"
    if outcome.eval_loss is not None:
        kept = "weights are" if whole else "adapter is"
        lines.append(f"held-out loss {outcome.eval_loss:.4f} at step {outcome.best_step}, whose {kept} kept")
    if outcome.stopped_early:
        lines.append("stopped early: the held-out loss no longer fell (train.early_stopping)")
    lines.append(f"model: {run.model}" if whole else f"adapter: {run.adapter}")
    lines.append(f"next: {'   or   '.join(next_commands(run, prepared))}")
    console.result("\n".join(lines))
