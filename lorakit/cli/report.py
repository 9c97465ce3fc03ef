"""`lorakit report`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.amounts import counted, decimal_bytes
from lorakit.cli.options import Json

if TYPE_CHECKING:
    from lorakit.progress import Progress
    from lorakit.run_dir import Run

_ROWS = 500


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folders of runs and sweeps.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page to write, by default report.html in the run's folder, of several runs here.",
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=0, help="Show the answers to at most so many rows.")
    ] = _ROWS,
    as_json: Json = False,
) -> None:
    """Write a page about runs: curves, scores with intervals, answers side by side, data and recipe.

    The page is one file that loads nothing: mail it, print it, open it without a network. It holds rows and answers. A
    run's own is written when training ends and by each [cyan]lorakit eval[/cyan]; this makes it again at any time, and
    of several runs one that compares them.
    """
    from lorakit import console
    from lorakit.report.write import write_report
    from lorakit.run_dir import Run

    page = output or (Run(runs[0]).report if len(runs) == 1 else Path("report.html"))
    facts = write_report(list({run.resolve(): run for run in reversed(runs)}.values())[::-1], page, rows)
    if as_json:
        console.result_json(facts)
    else:
        about = counted(len(facts["runs"]), "run")
        console.result(f"report: {page} ({about}, {decimal_bytes(facts['bytes'])})")


def refresh_report(run: "Run", progress: "Progress") -> None:
    """Write a run's own page again; that it cannot be written is said, and stops nothing."""
    from lorakit.errors import LorakitError
    from lorakit.report.write import write_report

    try:
        write_report([run.folder], run.report, _ROWS)
    except LorakitError as error:
        progress.warn(f"no report was written: {error}")
    else:
        progress.say(f"report: {run.report}")
