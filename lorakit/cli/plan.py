"""`lorakit plan`"""

import gc
import math
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.options import Json, Overrides, Quiet, RecipePath
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.hardware.machine import Machine
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
            help="Plan for this card instead of this machine: a name ([cyan]RTX 4090[/cyan]), several "
            "([cyan]4x RTX 4090[/cyan]), a memory size ([cyan]24GB[/cyan]), or [cyan]all[/cyan] known cards.",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", metavar="N", min=1, help="Plan for so many devices that train together."),
    ] = None,
    sharding: Annotated[
        str | None,
        typer.Option("--sharding", metavar="WORD", help="Plan with this train.sharding: what the devices share out."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            metavar="NAME",
            help="What joins the devices: [cyan]nvlink[/cyan], [cyan]pcie[/cyan], [cyan]100gb[/cyan] and others, "
            "instead of what usually joins such cards.",
        ),
    ] = None,
    per_hour: Annotated[
        float | None,
        typer.Option("--price", metavar="PER-HOUR", min=0, help="Price of an hour of one device, in any currency."),
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
    _refuse_options(gpu, per_hour, probe, devices)
    from lorakit import console
    from lorakit.cli.plan_report import PlanReport, print_plan
    from lorakit.hardware.devices import devices_of
    from lorakit.hardware.links import find_link
    from lorakit.plan import model_info
    from lorakit.plan.advice import collect_advice
    from lorakit.plan.changes import ChangeSearch
    from lorakit.plan.estimate import full_fine_tuning, plan_run
    from lorakit.recipe.load import load

    progress = console.Terminal(quiet)
    count, card = _count_devices(gpu, devices, probe)
    overrides = [*overrides, f"train.sharding={sharding}"] if sharding else overrides
    loaded = load(recipe, overrides)
    settings = loaded.recipe
    with loaded.locating():
        model_info.check_local_base(settings, complete=False)
        info = _model_info(settings, progress)
        model_info.refuse_by_config(settings, info)
        rows = _rows(settings)
    if card == "all":
        with loaded.locating():
            _plan_cards(settings, info, rows, count, link, per_hour, as_json)
        return
    too_long = model_info.beyond_training(settings, info, rows.longest)
    for warning in filter(None, (model_info.describe_missing_files(settings), too_long)):
        progress.warn(warning)

    def plan_on(number: int) -> "Plan":
        machine = _machine(card, number)
        chosen = find_link(link, machine.card) if link else None
        return plan_run(settings, info, rows, machine, per_hour, devices_of(machine, number, chosen))

    with loaded.locating():
        estimate = plan_on(count)
        fewer = [plan_on(2**power) for power in range((count - 1).bit_length())]
    quantized = info.stored is not None and info.stored.treatment == "kept"
    full = None if quantized else full_fine_tuning(settings, info, rows, estimate.machine, estimate.devices)
    search = ChangeSearch(estimate, info, lambda more: load(recipe, [*overrides, *more]).recipe)
    changes = search.smaller() if estimate.fits != "yes" else search.larger()
    notes = collect_advice(estimate, changes, info, fewer, str(recipe))
    with loaded.locating():
        measured = None
        if probe:  # the longest micro-batch, run once on this machine's device
            from lorakit.prepare import prepare_run
            from lorakit.train.preflight import probe_run

            measured = probe_run(prepare_run(settings, progress), progress)
    print_plan(PlanReport(estimate, full, info.stored, changes, notes, measured, fewer), as_json)
    if estimate.fits == "no" and measured is None:
        raise SystemExit(1)


def _refuse_options(gpu: str | None, per_hour: float | None, probe: bool, devices: int | None) -> None:
    if probe and gpu:
        raise typer.BadParameter("--probe runs on this machine, --gpu plans for another one. Leave one of them out.")
    if probe and devices not in (None, 1):
        raise typer.BadParameter("--probe runs on one device. Leave one of the options out.")
    if per_hour is not None and not math.isfinite(per_hour):
        raise typer.BadParameter("--price is not a price. Write what an hour costs, such as 0.45.")
    if gpu is not None and not gpu.strip():
        raise typer.BadParameter("--gpu is empty. Write a card's name, its memory, or all.")


def _count_devices(gpu: str | None, devices: int | None, probe: bool) -> tuple[int, str | None]:
    """How many devices are planned for, and the card as it is named: None is this machine's."""
    from lorakit.hardware.devices import visible_gpus
    from lorakit.hardware.gpus import split_count

    if gpu is None:
        return devices or (1 if probe else max(1, len(visible_gpus()))), None
    count, card = split_count(gpu)
    if count and devices and count != devices:
        raise typer.BadParameter(f"--gpu says {count} devices and --devices {devices}. Leave one of them out.")
    return count or devices or 1, "all" if card.lower() == "all" else card


def _machine(card: str | None, count: int) -> "Machine":
    """The device that is planned for, as each of so many has it."""
    from lorakit.hardware.devices import device_here
    from lorakit.hardware.gpus import find_gpu
    from lorakit.hardware.machine import machine_with

    return machine_with(find_gpu(card)) if card else device_here(count)


def _plan_cards(
    settings: "Recipe",
    info: "ModelInfo",
    rows: "RowEstimate",
    count: int,
    link: str | None,
    per_hour: float | None,
    as_json: bool,
) -> None:
    """Plan for so many of each known card."""
    from lorakit.cli.plan_report import print_cards
    from lorakit.hardware.devices import devices_of
    from lorakit.hardware.gpus import GPUS
    from lorakit.hardware.links import find_link
    from lorakit.hardware.machine import machine_with
    from lorakit.plan.estimate import plan_run

    plans: list[Plan | UserError] = []
    for card in GPUS:
        machine = machine_with(card)
        devices = devices_of(machine, count, find_link(link, card) if link else None)
        try:
            plans.append(plan_run(settings, info, rows, machine, per_hour, devices))
        except UserError as error:
            plans.append(error)
    if isinstance(plans[0], UserError) and all(isinstance(one, UserError) for one in plans):
        raise plans[0]
    print_cards(list(GPUS), plans, as_json, count)


def _model_info(settings: "Recipe", progress: "Progress") -> "ModelInfo":
    """What the base model is made of: counted from its config, or built without weights where its family is another."""
    from dataclasses import replace

    from lorakit.plan.model_info import find_config, find_model_folder, parse_model_info, with_added_rows
    from lorakit.recipe.problem import one_line

    base = settings.model.base
    config = find_config(base, settings.model.revision)
    if config is None:
        raise UserError(
            f"model.base: the sizes of {base} are not known here. Give a local folder with its config.json, fetch the "
            "model once (lorakit train RECIPE --dry-run), or plan on a well-known model of the same size."
        )
    config = with_added_rows(config, base, settings.model.revision, settings.model.add_tokens)
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
        has_config = folder and (folder / "config.json").is_file() and not settings.model.add_tokens
        source = folder if folder and has_config else config
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
