"""What the commands that score models share: their options, the models they name, and where results go."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.evaluate.models import ModelSet
    from lorakit.progress import Progress

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="X...",
        help="A run, an adapter's or a model's folder, a hub id, or [cyan]base[/cyan]. One run alone means its base, "
        "its adapter and its merged model.",
        show_default=False,
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="X", help="What the others are compared with: the base, else the first."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, metavar="N", help="The longest answer, instead of the recipe's."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Compute everything anew, and store nothing.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Where the files go; the default is eval/ of the first run."),
]
Quantizations = Annotated[
    str | None,
    typer.Option(
        "--quantizations",
        metavar="A,B",
        help="Also run adapters on their base in these quantizations: none, q8, q4, nf4.",
    ),
]
NOT_STORED = "not stored: no run is among the models. --output DIR says where scores and answers go"


@contextmanager
def open_models(named: list[str], quantizations: str | None, progress: "Progress") -> "Iterator[ModelSet]":
    """The models of the arguments, runs among them locked against a training that would replace them."""
    from lorakit.evaluate.models import add_quantizations, lock_runs, resolve_models
    from lorakit.registry import QUANTIZERS

    words = [word.strip() for word in quantizations.split(",")] if quantizations is not None else []
    for word in words:
        if word not in QUANTIZERS:
            names = ", ".join(QUANTIZERS.names())
            raise UserError(f"--quantizations: {word!r} is not a quantization. Write some of {names}.")
    if not named:
        raise UserError("no model is named. Give the folder of a run, such as runs/NAME.")
    with lock_runs(named):
        models = resolve_models(named, progress)
        yield add_quantizations(models, list(dict.fromkeys(words))) if words else models


def results_folder(models: "ModelSet", output: Path | None) -> Path | None:
    """Where scores are stored: the folder named, else that of the first run; None where there is neither. One that
    cannot be written or created is refused, before hours of work."""
    folder = output or (models.run.evaluations if models.run else None)
    if folder:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            reason = "cannot be written" if there.is_dir() else f"{there} is a file"
            raise UserError(f"--output: {folder}: {reason}. Give --output DIR, a folder for scores and answers.")
    return folder
