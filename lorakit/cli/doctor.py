"""`lorakit doctor`"""

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

    Python, packages, GPUs, bitsandbytes by real calls, processor speed, memory, whether several processes can compute
    together, what [bold]auto[/bold] chooses here, disk, the hub, and models that need no network; with a recipe also
    what that one needs. Each finding is [bold]ok[/bold], [bold]note[/bold] (worth knowing) or [bold]broken[/bold] (with
    what to do). Takes about fifteen seconds. Exit code 0, or 1 where something is broken.
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
        _print(result)
    broken = [result.name for _, result in results if result.state == "broken"]
    if as_json:
        keys = ("name", "state", "remedy", "figures")
        findings = [
            {"section": name, "found": one.message} | {key: getattr(one, key) for key in keys} for name, one in results
        ]
        console.result_json({"ok": not broken, "findings": findings})
    else:
        notes = sum(result.state == "note" for _, result in results)
        names = f": {', '.join(broken)}" if broken else ""
        console.result(f"\n{len(results)} findings, {notes} to note, {len(broken)} broken{names}")
    if broken:
        raise SystemExit(EXIT_FAILED)


def _print(result: "DoctorFinding") -> None:
    from lorakit import console

    under = " " * (2 + _STATE + _NAME)
    console.result_wrapped(result.message, under, f"  {result.state:{_STATE}}{result.name + ' ':{_NAME}}")
    if result.remedy:
        console.result_wrapped(result.remedy, f"{under}   ", f"{under}-> ")
