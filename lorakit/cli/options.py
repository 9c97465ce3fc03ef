"""Arguments and options that several commands share."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.prepare import GivenRows

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, such as [cyan]train.learning_rate=1e-4[/cyan]. May be given several times.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings and the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what this command wrote there before.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write the result.")]
Devices = Annotated[
    int | None,
    typer.Option(
        "--devices",
        metavar="N",
        min=1,
        help="Run on so many devices of this machine, a process on each: by default every visible GPU, and one process "
        "on a processor. Under torchrun, accelerate launch or srun the processes are those that it starts.",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Where the base model is now: a folder or hub id. A run's is known by the sha256 of its files.",
    ),
]
RowFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="The format of --data's rows, as data.format has it: auto, messages, text, ...; by default the recipe's.",
    ),
]
RowColumns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="OURS=THEIRS,...",
        help="The columns of --data's rows, as data.columns has them; empty for none. By default the recipe's.",
    ),
]
Onto = Annotated[
    Literal["trained", "original"] | None,
    typer.Option(
        "--onto",
        help="The weights to add the adapter to: those that it was trained on (the default; a quantized base is "
        "dequantized), or the base's own in full precision, with the drift stated.",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Round all weights to this type; by default each keeps its own."),
]
NoProof = Annotated[bool, typer.Option("--no-proof", help="Do not compare the merged model with the adapter.")]


def quoted(path: Path) -> str:
    """A path as a shell reads it, not to be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def given_rows(data: Path | None, row_format: str | None, columns: str | None) -> "GivenRows | None":
    """The rows of `--data FILE`, with what `--format` and `--columns` say of them; UserError where that is wrong."""
    if data is None:
        for option, value in {"--format": row_format, "--columns": columns}.items():
            if value is not None:
                raise UserError(f"{option}: is of the rows of --data FILE, and none are given. Add --data FILE.")
        return None
    from lorakit.prepare import GivenRows

    fields = None if columns is None else _parse_columns(columns)
    return GivenRows(data, None if row_format is None else _parse_format(row_format), fields)


def _parse_columns(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs):
            raise UserError(f"--columns: {part.strip()!r} is not ours=theirs. Write for example prompt=question.")
        if ours in fields:
            raise UserError(f"--columns: {ours} is there twice. Leave one out.")
        fields[ours] = theirs
    return fields


def _parse_format(text: str) -> Any:
    """The value of `data.format`, as a recipe would have it: a word, or a word with its settings."""
    from pydantic import ValidationError

    from lorakit.recipe.did_you_mean import nearest
    from lorakit.recipe.paths import resolve_paths
    from lorakit.recipe.problem import Location, dotted_name
    from lorakit.recipe.rules import format_conflicts
    from lorakit.recipe.schema import Data
    from lorakit.recipe.yaml_reader import Node, read_text
    from lorakit.registry import FORMATS

    node, problems = read_text(text, Location())
    try:
        if node is None or problems:
            raise ValueError(text)
        resolved, mistakes = resolve_paths(Node({"data": Node({"format": node}, node.place)}, node.place))
        given = Data.model_validate({"train": "-", **resolved["data"]}).format
        conflicts = format_conflicts(("data", "format"), given)
        complaints = [(one.path, one.reason, one.remedy) for one in mistakes]
        complaints += [(dotted_name(path), reason, remedy) for path, reason, remedy in conflicts]
        if complaints:
            raise UserError("--format: {}: {}. {}".format(*complaints[0]))
        return given
    except (ValidationError, ValueError) as error:
        words = ["auto", *FORMATS.names()]
        near = nearest(text, words)
        remedy = f"Did you mean {near}?" if near else f"Write one of {', '.join(words)}."
        raise UserError(f"--format: {text!r} is not a format with settings that it takes. {remedy}") from error
