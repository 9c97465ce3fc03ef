"""`lorakit plan`"""

import gc
import math
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.options import Json, Overrides, Quiet, RecipePath
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.plan.estimate import Plan, RowEstimate
    from lorakit.plan.model_info import ModelInfo
    from lorakit.progress import Progress
    from lorakit.recipe.schema import Recipe


def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME|SIZE|all",
            help="Plan for this card instead of this machine: a name ([cyan]RTX 4090[/cyan]), a memory size "
            "([cyan]24GB[/cyan]), or [cyan]all[/cyan] known cards.",
        ),
    ] = None,
    per_hour: Annotated[
        float | None, typer.Option("--price", metavar="PER-HOUR", min=0, help="Price of an hour, in any currency.")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Also load the model here and run the longest micro-batch: predicted against measured."
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell before a run whether it fits, how long it takes and what it costs.

    From the model's config and its tokenizer: no weights, no GPU, no network. Memory by component, sizes, steps, time
    with its range; what to change where it does not fit, what would use the room where it does, and advice with its
    source.

    Exit code 0 where it fits or was only asked for [cyan]--gpu all[/cyan], 1 where it does not, 2 where the recipe is
    wrong.
    """
    if probe and gpu:
        raise typer.BadParameter("--probe runs on this machine, --gpu plans for another one. Leave one of them out.")
    if per_hour is not None and not math.isfinite(per_hour):
        raise typer.BadParameter("--price is not a price. Write what an hour costs, such as 0.45.")
    if gpu is not None and not gpu.strip():
        raise typer.BadParameter("--gpu is empty. Write a card's name, its memory, or all.")
    from lorakit import console
    from lorakit.cli.plan_report import PlanReport, print_cards, print_plan
    from lorakit.hardware.gpus import GPUS, find_gpu
    from lorakit.hardware.machine import machine_with, this_machine
    from lorakit.plan import model_info
    from lorakit.plan.advice import collect_advice
    from lorakit.plan.changes import ChangeSearch
    from lorakit.plan.estimate import full_fine_tuning, plan_run
    from lorakit.recipe.load import load

    progress = console.Terminal(quiet)
    loaded = load(recipe, overrides)
    settings = loaded.recipe
    with loaded.locating():
        model_info.check_local_base(settings, complete=False)
        info = _model_info(settings, progress)
        model_info.refuse_by_config(settings, info)
        rows = _rows(settings)
    if gpu and gpu.strip().lower() == "all":
        plans: list[Plan | UserError] = []
        for card in GPUS:
            try:
                plans.append(plan_run(settings, info, rows, machine_with(card), per_hour))
            except UserError as error:
                plans.append(error)
        with loaded.locating():
            if isinstance(plans[0], UserError) and all(isinstance(one, UserError) for one in plans):
                raise plans[0]
        print_cards(list(GPUS), plans, as_json)
        return
    too_long = model_info.beyond_training(settings, info, rows.longest)
    for warning in filter(None, (model_info.describe_missing_files(settings), too_long)):
        progress.warn(warning)
    machine = machine_with(find_gpu(gpu)) if gpu else this_machine()
    with loaded.locating():
        estimate = plan_run(settings, info, rows, machine, per_hour)
    quantized = info.stored is not None and info.stored.treatment == "kept"
    full = None if quantized else full_fine_tuning(settings, info, rows, machine)
    search = ChangeSearch(estimate, info, lambda more: load(recipe, [*overrides, *more]).recipe)
    changes = search.smaller() if estimate.fits != "yes" else search.larger()
    notes = collect_advice(estimate, changes, info)
    with loaded.locating():
        measured = None
        if probe:  # the longest micro-batch, run once on this machine's device
            from lorakit.prepare import prepare_run
            from lorakit.train.preflight import probe_run

            measured = probe_run(prepare_run(settings, progress), progress)
    print_plan(PlanReport(estimate, full, info.stored, changes, notes, measured), as_json)
    if estimate.fits == "no" and measured is None:
        raise SystemExit(1)


def _model_info(settings: "Recipe", progress: "Progress") -> "ModelInfo":
    """What the base model is made of: counted from its config, or built without weights where its family is another."""
    from dataclasses import replace

    from lorakit.plan.model_info import find_config, find_model_folder, parse_model_info
    from lorakit.recipe.problem import one_line

    base = settings.model.base
    config = find_config(base, settings.model.revision)
    if config is None:
        raise UserError(
            f"model.base: the sizes of {base} are not known here. Give a local folder with its config.json, fetch the "
            "model once (lorakit train RECIPE --dry-run), or plan on a well-known model of the same size."
        )
    info = parse_model_info(config)
    if info is None:
        raise UserError(f"model.base: the config.json of {base} names no hidden size as a whole number of at least 1.")
    if info.spec is None:
        kind = one_line(str(config.get("model_type")))
        progress.say(f"model.base: a {kind} is not counted from its config: building it without weights")
        from lorakit.model.tokenizer import quiet_libraries
        from lorakit.plan.activations import spec_with_trace

        quiet_libraries()
        folder = find_model_folder(base, settings.model.revision)
        source = folder if folder and (folder / "config.json").is_file() else config
        info = replace(info, spec=spec_with_trace(source, settings.adapter))
    return info


def _rows(settings: "Recipe") -> "RowEstimate":
    from lorakit.plan.model_info import find_template
    from lorakit.plan.row_sample import estimate_rows

    gc.disable()  # imports make no garbage, and looking for it takes a fifth of their time
    try:
        return estimate_rows(settings, lambda: find_template(settings))
    finally:
        gc.enable()
