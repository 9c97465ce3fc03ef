"""`lorakit doctor`"""

import shutil
import sys
import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.options import Json, Overrides
from lorakit.errors import EXIT_FAILED

if TYPE_CHECKING:
    from lorakit.doctor.finding import CheckResult

Recipe = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="Ask also for what this recipe needs.", show_default=False)
]
Network = Annotated[bool, typer.Option("--network", help="Ask the hub too, whether it answers and takes the token.")]

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
    from lorakit.doctor.run import examine

    asked = None
    if recipe:
        from lorakit.recipe.load import load

        asked = load(recipe, overrides).recipe
    found, shown = [], ""
    for section, finding in examine(network, asked):
        found.append((section, finding))
        if as_json:
            continue
        if section != shown:
            console.result(f"\n{section}" if shown else section)
            shown = section
        console.result(_lines(finding, _width()))
    broken = [finding.name for _, finding in found if finding.state == "broken"]
    if as_json:
        findings = [{"section": section, **asdict(finding)} for section, finding in found]
        console.result_json({"ok": not broken, "findings": findings})
    else:
        notes = sum(finding.state == "note" for _, finding in found)
        console.result(f"\n{len(found)} findings, {notes} to note, {len(broken)} broken" + _named(broken))
    if broken:
        raise SystemExit(EXIT_FAILED)


def _named(broken: list[str]) -> str:
    return f": {', '.join(broken)}" if broken else ""


def _width() -> int:
    """The width to break lines at: the terminal's; in a pipe or a file a line stays one line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 20


def _lines(finding: "CheckResult", width: int) -> str:
    """A finding: state, name, what was found, and under it what to do."""
    begin, under = f"  {finding.state:{_STATE}}{finding.name:{_NAME}}", " " * (2 + _STATE + _NAME)
    long_name = len(finding.name) >= _NAME
    wrap = partial(textwrap.wrap, width=max(width - 1, 60), break_on_hyphens=False)  # commands are to be copied
    lines = [begin] if long_name else []
    lines += wrap(finding.message, initial_indent=under if long_name else begin, subsequent_indent=under)
    if finding.remedy:
        lines += wrap(finding.remedy, initial_indent=f"{under}-> ", subsequent_indent=f"{under}   ")
    return "\n".join(lines)
