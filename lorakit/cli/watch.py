"""`lorakit watch`"""

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.options import Json


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="How often to look.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a run while it trains: its losses as curves, how far it is, and the time left.

    It reads the run's folder and disturbs nothing, from another terminal or over a shared file system; Ctrl-C stops the
    watching alone. It ends when the run ends, and looks once where the output is not a terminal.
    """
    from lorakit import console
    from lorakit.report.watch import RunWatch, frame
    from lorakit.run_dir import Run

    watched = RunWatch(Run(run))
    summary = watched.look()
    if as_json:
        console.result_json(summary.to_dict())
        return
    size = shutil.get_terminal_size()
    if once or summary.state != "running" or not sys.stdout.isatty():
        console.result_frame(frame(watched, summary, size.columns, size.lines))
        return
    with console.full_screen() as show, suppress(KeyboardInterrupt):
        while summary.state == "running":
            size = shutil.get_terminal_size()
            show(frame(watched, summary, size.columns, size.lines - 1))
            time.sleep(every)
            summary = watched.look()
    console.result_frame(frame(watched, summary, size.columns, size.lines))
