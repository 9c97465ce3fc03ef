"""`lorakit runs`"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.options import Json

if TYPE_CHECKING:
    from lorakit.share.runs import RunSummary

_DEFAULT = Path("runs")


def runs(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Where the runs are, at any depth; by default runs.", show_default=False),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            metavar="KEY",
            help="name, recipe, base, data, steps, loss, metric, verdict, date or state; best and newest first.",
        ),
    ] = "date",
    as_json: Json = False,
) -> None:
    """List the runs in a folder: what each was trained from, how far it came, and how good it is.

    The metric is the first of the recipe's in the newest `lorakit eval` of the run, the verdict is against the base. A
    run that is broken is listed with the reason; links and hidden folders are not searched.
    """
    from lorakit import console
    from lorakit.share.runs import find_runs, sort_runs

    sort_runs([], sort)  # a wrong key is refused before anything is searched
    root = folder or _DEFAULT
    summaries, notes = ([], []) if folder is None and not root.exists() else find_runs(root)
    ordered, progress = sort_runs(summaries, sort), console.Terminal()
    for note in notes:
        progress.warn(note)
    if as_json:
        console.result_json({"folder": str(root), "sort": sort, "runs": [run.to_dict() for run in ordered]})
    elif ordered:
        _print(ordered)
    else:
        console.result(f"no runs in {root}. lorakit train RECIPE makes one; lorakit runs DIR looks elsewhere.")


def _print(ordered: "list[RunSummary]") -> None:
    """A table without the columns that no run fills, or that say what the folders say, and below it why a run is failed
    or broken."""
    from lorakit import console
    from lorakit.amounts import counted
    from lorakit.share.runs import short_base, short_data, short_score

    named_alike = all(run.recipe in (None, run.folder.name) for run in ordered)
    columns = {
        "run": [str(run.folder) for run in ordered],
        "recipe": ["-" if named_alike else run.recipe or "-" for run in ordered],
        "base": [short_base(run) for run in ordered],
        "data (rows)": [short_data(run) for run in ordered],
        "steps": [_steps(run) for run in ordered],
        "held-out loss": [_losses(run) for run in ordered],
        "metric": [short_score(run) for run in ordered],
        "verdict": [run.verdict or "-" for run in ordered],
        "date (UTC)": [run.date[:16].replace("T", " ") or "-" for run in ordered],
        "state": [run.state for run in ordered],
    }
    filled = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    left_out = [name for name in _first_to_go(filled) if filled.pop(name)]
    title = counted(len(ordered), "run")
    title += f" (the terminal is too narrow for {', '.join(left_out)})" if left_out else ""
    console.result_table(title, [*filled], list(zip(*filled.values(), strict=True)), whole_lines=True)
    for run in ordered:
        if run.reason:
            console.result_wrapped(f"{run.folder}: {run.state}: {run.reason}", under="  ")
        for note in run.notes:
            console.Terminal().warn(note)


def _first_to_go(columns: dict[str, list[str]]) -> list[str]:
    """The columns that a terminal has no room for, what is needed least first; a pipe has room for all."""
    widths = {name: 3 + max(map(len, [name, *cells])) for name, cells in columns.items()}
    room, gone = shutil.get_terminal_size().columns - 1, list[str]()
    for name in ("recipe", "data (rows)", "base", "date (UTC)", "verdict", "steps", "metric"):
        if sys.stdout.isatty() and name in widths and sum(widths.values()) > room:
            del widths[name]
            gone.append(name)
    return gone


def _steps(run: "RunSummary") -> str:
    return "-" if run.steps_done is None else f"{run.steps_done:,}/{run.steps_planned or '?'}"


def _losses(run: "RunSummary") -> str:
    """The best one, and the last where that is another."""
    if run.best_loss is None or run.last_loss is None:
        return "-"
    last = "" if run.last_loss == run.best_loss else f" (last {run.last_loss:.4f})"
    return f"{run.best_loss:.4f}{last}"
