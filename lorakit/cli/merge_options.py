"""The options of `lorakit merge`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

_SEVERAL, _TAKE_OUT, _CHECK = "Several adapters", "A LoRA out of two models", "A merged model from elsewhere"

Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...",
        help="The folder of a run, such as runs/debian-json, or of an adapter; several runs to combine. With "
        "--extract, the base model.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Where to write; of one run, RUN/merged is the default."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier `lorakit merge` left there.")]
Onto = Annotated[
    Literal["trained", "original"] | None,
    typer.Option(
        "--onto",
        help="The weights to add the adapter to: those that it was trained on (the default; a quantized base is "
        "dequantized), or the base's own in full precision, with the drift stated.",
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Round all weights to this type; else each keeps its own.", show_default=False),
]
BasePlace = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Where the base model is: a folder or hub id. The run or the adapter names one.",
        show_default=False,
    ),
]
DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Rows to prove the merge on; else the run's own, or general texts for an adapter without a run.",
        show_default=False,
    ),
]
NoProof = Annotated[bool, typer.Option("--no-proof", help="Do not compare the merged model with the adapter's.")]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help="linear, cat, svd, ties, dare-linear, dare-ties or magnitude-prune. cat is the exact weighted sum.",
        show_default=False,
        rich_help_panel=_SEVERAL,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="0.5,0.5", help="One for each run.", rich_help_panel=_SEVERAL),
]
Density = Annotated[
    float | None,
    typer.Option("--density", help="The share of numbers that a method keeps.", rich_help_panel=_SEVERAL),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Of the methods that draw at random.", rich_help_panel=_SEVERAL)
]
IntoBase = Annotated[
    bool,
    typer.Option("--into-base", help="Write a merged model instead of an adapter.", rich_help_panel=_SEVERAL),
]
Rank = Annotated[
    int | None, typer.Option("--rank", help="Of the extracted adapter, or of svd's.", rich_help_panel=_TAKE_OUT)
]
Extract = Annotated[
    Path | None,
    typer.Option(
        "--extract",
        metavar="TUNED",
        help="Take a LoRA out of a tuned model and its base: --extract TUNED BASE --rank 32.",
        rich_help_panel=_TAKE_OUT,
    ),
]
KeepWhole = Annotated[
    bool,
    typer.Option(
        "--keep-whole",
        help="Keep changed norms, embeddings and head whole in the adapter.",
        rich_help_panel=_TAKE_OUT,
    ),
]
Verify = Annotated[
    Path | None,
    typer.Option(
        "--verify",
        metavar="FOLDER",
        help="Prove again that a folder is the merged model of RUN; nothing is written.",
        rich_help_panel=_CHECK,
    ),
]
