"""`lorakit benchmark`"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.devices import on_devices, terminal_of_first
from lorakit.cli.eval import NOT_STORED, Baseline, Models, Output, Quantizations, open_models, results_folder
from lorakit.cli.options import BaseOption, Devices, Json, Quiet
from lorakit.errors import UserError


def benchmark(
    tasks: Annotated[
        str,
        typer.Option("--tasks", metavar="A,B", help="Tasks of lm-eval, such as gsm8k,mmlu.", show_default=False),
    ],
    models: Models = [],  # noqa: B006
    tasks_path: Annotated[
        Path | None,
        typer.Option(
            "--tasks-path", metavar="DIR", help="Task files of your own. They are programs: their templates run."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--benchmark-data",
            metavar="DIR",
            help="Take the tasks' data from files in DIR, as they are published or as on the hub, instead of the hub.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N rows of each task.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, metavar="N", help="Examples in a prompt, instead of each task's own number."),
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Put tasks into the chat template.")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that models write, where a task asks for it: confined.")
    ] = False,
    quantizations: Quantizations = None,
    baseline: Baseline = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the intervals.")] = 0,
    output: Output = None,
    devices: Devices = None,
    base: BaseOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run lm-eval's benchmarks on models side by side.

    Each figure has its 95 % interval, and each model's difference from the baseline a verdict. Benchmarks need the
    package lm-eval (pip install 'lorakit\\[tasks]'); their data comes from the hub, or from --benchmark-data.
    """
    from lorakit import console
    from lorakit.distributed.processes import is_first

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise UserError("--tasks: no task is named. Write names with commas, such as --tasks gsm8k,arc_easy.")
    with on_devices(devices, remedy=lambda: "No figures were stored: start again."):
        progress = terminal_of_first(quiet)
        with open_models(models, quantizations, progress, base=base) as model_set:
            from lorakit.evaluate.benchmarks.run import run_benchmark
            from lorakit.evaluate.benchmarks.settings import BenchmarkSettings
            from lorakit.evaluate.report import write_document
            from lorakit.evaluate.run import find_baseline

            folder = results_folder(model_set, output) if is_first() else None
            compared = model_set.specs[find_baseline(model_set, baseline)].name
            plan = BenchmarkSettings(names, tasks_path, limit, chat_template, allow_code, seed, data, shots)
            document, tables = run_benchmark(model_set, plan, compared, progress)
            if not is_first():
                return
            path = write_document(document, folder, "tasks-") if folder else None
    if as_json:
        console.result_json({**document, "file": str(path) if path else None})
        return
    for table in tables:
        console.result_table(*table)
    for note in document["notes"]:
        console.result(note)
    console.result(f"all figures: {path}" if path else NOT_STORED)
