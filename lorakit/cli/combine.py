"""`lorakit combine`"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.amounts import percent
from lorakit.cli.devices import on_devices, terminal_of_first
from lorakit.cli.options import BaseOption, Devices, Dtype, Json, NoProof, Onto, OutputFolder, Overwrite, Quiet
from lorakit.errors import UserError


def combine(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Runs that trained adapters on one base model.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="linear, cat, svd, ties, dare-linear, dare-ties or magnitude-prune. cat is the exact weighted sum, "
            "svd the nearest to it within a rank.",
        ),
    ],
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="0.5,0.5",
            help="A factor for each run. They need not add up to 1; a negative one takes an adapter away.",
        ),
    ],
    output: OutputFolder,
    overwrite: Overwrite = False,
    density: Annotated[
        float | None,
        typer.Option("--density", help="The share of numbers that ties, dare-* and magnitude-prune keep, such as 0.5."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Of dare-*, which draw at random.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Of svd; by default the largest of the adapters'.")
    ] = None,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Write a merged model, with its proof, instead of an adapter.")
    ] = False,
    onto: Onto = None,
    dtype: Dtype = None,
    no_proof: NoProof = False,
    base: BaseOption = None,
    devices: Devices = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one adapter of several runs' adapters, and score it on each run's held-out rows.

    An example: lorakit combine runs/a runs/b --method cat --weights 0.5,0.5 --output adapters/both. The scores show
    what each run's own adapter gained, and how much of that the combination keeps.
    """
    from lorakit import console
    from lorakit.distributed.processes import is_first

    for option, value in {"onto": onto, "dtype": dtype, "no-proof": no_proof}.items():
        if value and not into_base:
            raise UserError(f"--{option}: requires --into-base, since an adapter is written without it.")
    factors = _parse_weights(weights)
    options = {"onto": onto or "trained", "dtype": dtype, "proved": not no_proof} if into_base else None
    with on_devices(devices, remedy=lambda: "Nothing was put in place: start again."):
        from lorakit.merge.combine import Combination, combine_runs
        from lorakit.run_dir import Run

        progress, runs = terminal_of_first(quiet), [Run(folder) for folder in folders]
        how = Combination(method, factors, density, seed, rank)
        facts, merged = combine_runs(runs, how, output, progress, overwrite=overwrite, into_base=options, base=base)
        if not is_first():
            return
    if as_json:
        console.result_json(facts | (merged.facts() if merged else {}))
        return
    rows = []
    for score in facts["scores"]:
        losses = [f"{score[model]:.4f}" for model in ("base", "own", "combined")]
        gain = "-" if score["kept"] is None else percent(score["kept"])
        rows.append([score["run"], f"{score['rows']:,}", *losses, gain])
    if rows:
        columns = ["run", "rows", "base", "its adapter", "combined", "gain kept"]
        console.result_table("loss on each run's held-out rows", columns, rows)
    made = facts["combined"]
    lines = [] if merged else [f"adapter: {output}"]
    lines.append(
        f"{method} of {len(folders)} adapters: rank {made['rank']}, {made['modules']} modules, {made['parameters']:,} "
        f"parameters; {percent(made['off_sum'], 1)} away from the weighted sum of their changes"
    )
    unscored = facts["without_held_out_rows"]
    lines += [f"{run}: has no held-out rows that can be read, and was not scored" for run in unscored]
    lines += [f"merged model: {merged.folder}", *merged.in_words()] if merged else []
    console.result("\n".join(lines))


def _parse_weights(weights: str) -> list[float]:
    try:
        return [float(part) for part in weights.split(",")]
    except ValueError as error:
        raise UserError(f"--weights: {weights!r} are not numbers with commas between them, such as 0.5,0.5.") from error
