"""Arguments and options that several commands share."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

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
