"""`lorakit new`"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.options import Json
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.share.new import NewTask


def new(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="NAME", help="The folder to start; its runs get its name.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--from", metavar="TASK", help="Copy a complete task of the gallery, with its rows."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Your rows: their format, columns and a split are written."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The base model: a hub id or a path. By default a small one, which is then named.",
        ),
    ] = None,
    list_tasks: Annotated[bool, typer.Option("--list", help="Show the tasks of the gallery.")] = False,
    as_json: Json = False,
) -> None:
    """Start a folder: a recipe with the keys that people change, each explained, rows or a place for them, a README.

    With [cyan]--data[/cyan] the rows stay where they are and are looked at: what they are is written into the recipe,
    and a guess is called one. Nothing is overwritten, and the folder is there whole or not at all.
    """
    if list_tasks:
        if folder or task or data or base:
            raise UserError("--list: shows the gallery, and takes --json alone beside it. Leave the others out.")
        _list(as_json)
        return
    if folder is None:
        raise UserError("NAME is missing: the folder to start. For example lorakit new my-task, or lorakit new --list")
    if task is not None and data is not None:
        raise UserError("--from copies a task with its rows, --data starts one from yours. Leave one of them out.")
    from lorakit.share.new import start_from_gallery, start_recipe

    folder = Path(os.path.normpath(folder))
    made = start_recipe(folder, base, data) if task is None else start_from_gallery(folder, task, base)
    if as_json:
        from lorakit import console

        console.result_json(_facts(made))
    else:
        _print(made, base is None and task is None)


def _facts(made: "NewTask") -> dict[str, Any]:
    shape = asdict(made.shape) if made.shape else None
    facts = {"folder": str(made.folder), "name": made.name, "from": made.task, "base": made.base, "files": made.files}
    return facts | {"data": shape, "notes": made.notes, "next": made.commands()}


def _print(made: "NewTask", is_default_base: bool) -> None:
    from lorakit import console

    console.result(f"{made.folder}: {', '.join(made.files)}")
    facts = [("base", f"{made.base}{' (the default; --base takes another)' if is_default_base else ''}")]
    if made.shape:
        shape = made.shape
        share = "none" if shape.eval is None else f"{shape.eval:.0%} of them"
        facts.append(("rows", f"{'' if shape.exact else 'about '}{shape.rows:,}; held out: {share}"))
        facts.append(("format", shape.why))
    console.result_facts(facts)
    for note in made.notes:
        console.result_wrapped(note, under="  ", begin="note: ")
    console.result("next: " + "\n      ".join(made.commands()))


def _list(as_json: bool) -> None:
    from lorakit import console
    from lorakit.share.gallery import gallery_tasks

    tasks = list(gallery_tasks())
    if as_json:
        console.result_json({"tasks": [asdict(task) for task in tasks]})
        return
    for task in tasks:
        console.result_wrapped(task.summary, under="  ", begin=f"{task.name}: ")
        console.result(f"  {task.train_rows:,} rows to train on, {task.eval_rows:,} held out; base {task.base}")
    console.result("\nlorakit new NAME --from TASK copies one.")
