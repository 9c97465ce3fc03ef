"""`lorakit extract`"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.amounts import percent
from lorakit.cli.options import Json, OutputFolder, Overwrite, Quiet

_SHOWN = 12


def extract(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="A fully tuned model: a folder or hub id.")],
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="The base model that it was trained from: a folder or hub id.")
    ],
    rank: Annotated[
        int, typer.Option("--rank", min=1, help="Of the adapter, such as 32; a higher one keeps more of the change.")
    ],
    output: OutputFolder,
    overwrite: Overwrite = False,
    keep_whole: Annotated[
        bool, typer.Option("--keep-whole", help="Keep changed norms, embeddings and head whole in the adapter.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Extract a LoRA adapter from a tuned model and its base.

    The adapter holds the largest singular directions of each linear layer's change. What it keeps of the change, and
    which changed weights it cannot hold, is printed.
    """
    from lorakit import console
    from lorakit.merge.extract import FACTS
    from lorakit.merge.extract import extract as extract_adapter
    from lorakit.model.resolve import resolve_base
    from lorakit.model.tokenizer import quiet_libraries
    from lorakit.output_dir import claim_output, refuse_overwriting_inputs

    progress = console.Terminal(quiet)
    quiet_libraries()
    with claim_output(output, overwrite, FACTS):
        tuned_model, base_model = (resolve_base(str(folder), "main", progress) for folder in (tuned, base))
        refuse_overwriting_inputs(output, tuned_model.folder, base_model.folder)
        made = extract_adapter(tuned_model, base_model, rank, output, progress, keep_whole=keep_whole)
    if as_json:
        console.result_json({"folder": str(output), **made})
        return
    if left := made["left"]:
        rows = [[one["path"], percent(one["change"], 2), one["reason"]] for one in left[:_SHOWN]]
        more = f" (and {len(left) - _SHOWN} more)" if len(left) > _SHOWN else ""
        columns = ["weight", "share of the change", "because"]
        console.result_table(f"changed, and not in the adapter{more}", columns, rows)
    layers = f"{len(made['taken'])} layers" + (f", {len(made['whole'])} modules whole" if made["whole"] else "")
    console.result(
        f"adapter: {output}\n"
        f"rank {rank}, {layers}, {made['parameters']:,} parameters: holds {percent(made['kept'], 1)} of the change "
        f"(squared Frobenius norm), {percent(made['kept_of_layers'], 1)} of that of its layers"
    )
