"""`lorakit doctor`"""

import shutil
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.options import Json, Overrides
from lorakit.errors import EXIT_FAILED

if TYPE_CHECKING:
    from lorakit.doctor.check import DoctorFinding

Recipe = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="Also check what this recipe needs.", show_default=False)
]
Network = Annotated[bool, typer.Option("--network", help="Also check whether the hub answers and takes the token.")]

_STATE, _NAME = 8, 17  # widths of the columns


def doctor(
    recipe: Recipe = None,
    overrides: Overrides = [],  # noqa: B006
    network: Network = False,
    as_json: Json = False,
) -> None:
    """Say what this machine can do, and what is broken on it.

    Python, packages, GPUs, bitsandbytes by real calls, processor speed, memory, what [bold]auto[/bold] chooses here,
    disk, the hub, and models that need no network; with a recipe also what that one needs. Each finding is
    [bold]ok[/bold], [bold]note[/bold] (worth knowing) or [bold]broken[/bold] (with what to do). Takes about ten
    seconds. Exit code 0, or 1 where something is broken.
    """
    if overrides and recipe is None:
        raise typer.BadParameter("--set overrides a key of a recipe. Name the recipe too.")
    from lorakit import console
    from lorakit.doctor.run import run_doctor

    settings = None
    if recipe:
        from lorakit.recipe.load import load

        settings = load(recipe, overrides).recipe
    results: list[tuple[str, DoctorFinding]] = []
    section = ""
    for name, result in run_doctor(network, settings):
        results.append((name, result))
        if as_json:
            continue
        if name != section:
            console.result(f"\n{name}" if section else name)
            section = name
        console.result(_lines(result, shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 20))
    broken = [result.name for _, result in results if result.state == "broken"]
    if as_json:
        findings = [
            {
                "section": name,
                "name": one.name,
                "state": one.state,
                "found": one.message,
                "remedy": one.remedy,
                "figures": one.figures,
            }
            for name, one in results
        ]
        console.result_json({"ok": not broken, "findings": findings})
    else:
        notes = sum(result.state == "note" for _, result in results)
        names = f": {', '.join(broken)}" if broken else ""
        console.result(f"\n{len(results)} findings, {notes} to note, {len(broken)} broken{names}")
    if broken:
        raise SystemExit(EXIT_FAILED)


def _lines(result: "DoctorFinding", width: int) -> str:
    """State, name and message of a result, and under it what to do."""
    begin, under = f"  {result.state:{_STATE}}{result.name:{_NAME}}", " " * (2 + _STATE + _NAME)
    long_name = len(result.name) >= _NAME
    wrap = partial(textwrap.wrap, width=max(width - 1, 60), break_on_hyphens=False)  # commands are to be copied
    lines = [begin] if long_name else []
    lines += wrap(result.message, initial_indent=under if long_name else begin, subsequent_indent=under)
    if result.remedy:
        lines += wrap(result.remedy, initial_indent=f"{under}-> ", subsequent_indent=f"{under}   ")
    return "\n".join(lines)
