"""`lorakit combine`"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorakit.amounts import percent
from lorakit.cli.merge import merge_facts, merge_text
from lorakit.cli.options import Dtype, Json, NoProof, Onto, OutputFolder, Overwrite, Quiet
from lorakit.errors import UserError


def combine(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Runs that trained adapters on one base model.", show_default=False),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="linear, cat, svd, ties, dare-linear, dare-ties or magnitude-prune. cat is the exact weighted sum, "
            "svd the nearest to it within a rank.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="0.5,0.5",
            help="A factor for each run. They need not add up to 1; a negative one takes an adapter away.",
            show_default=False,
        ),
    ],
    output: OutputFolder,
    overwrite: Overwrite = False,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="The share of numbers that ties, dare-* and magnitude-prune keep, such as 0.5.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of dare-*, which draw at random.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Of svd; the default is the largest of the adapters'.", show_default=False),
    ] = None,
    into_base: Annotated[
        bool,
        typer.Option("--into-base", help="Write a merged model, with its proof, instead of an adapter."),
    ] = False,
    onto: Onto = None,
    dtype: Dtype = None,
    no_proof: NoProof = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one adapter of several runs' adapters, and score it on each run's held-out rows.

    An example: lorakit combine runs/a runs/b --method cat --weights 0.5,0.5 --output adapters/both. The scores show
    what each run's own adapter gained, and how much of that the combination keeps.
    """
    from lorakit import console
    from lorakit.merge.combine_runs import combine_runs
    from lorakit.run_dir import Run

    for option, value in {"onto": onto, "dtype": dtype, "no-proof": no_proof}.items():
        if value and not into_base:
            raise UserError(f"--{option}: requires --into-base, since an adapter is written without it.")
    made = combine_runs(
        [Run(folder) for folder in folders],
        _parse_weights(weights),
        method,
        output,
        console.Terminal(quiet),
        density=density,
        seed=seed,
        rank=rank,
        overwrite=overwrite,
        into_base={"onto": onto or "trained", "dtype": dtype, "proved": not no_proof} if into_base else None,
    )
    combined = made.combined
    if as_json:
        facts = {
            "combined": asdict(combined) | {"folder": str(combined.folder)},
            "scores": [asdict(score) | {"kept": score.gain_share} for score in made.scores],
            "without_held_out_rows": made.without,
        }
        console.result_json(facts | (merge_facts(made.merged) if made.merged else {}))
        return
    if made.scores:
        rows = []
        for score in made.scores:
            losses = [f"{loss:.4f}" for loss in (score.base, score.own, score.combined)]
            share = "-" if score.gain_share is None else percent(score.gain_share)
            rows.append([score.run, f"{score.rows:,}", *losses, share])
        columns = ["run", "rows", "base", "its adapter", "combined", "gain kept"]
        console.result_table("loss on each run's held-out rows", columns, rows)
    lines = [] if made.merged else [f"adapter: {combined.folder}"]
    lines.append(
        f"{combined.method} of {len(folders)} adapters: rank {combined.rank}, {combined.modules} modules, "
        f"{combined.parameters:,} parameters; {percent(combined.off_sum, 1)} away from the weighted sum of their "
        "changes"
    )
    lines += [f"{run}: has no held-out rows that can be read, and was not scored" for run in made.without]
    if made.merged:
        lines.append(merge_text(made.merged, f"merged model: {made.merged.folder}"))
    console.result("\n".join(lines))


def _parse_weights(weights: str) -> list[float]:
    try:
        return [float(part) for part in weights.split(",")]
    except ValueError as error:
        raise UserError(f"--weights: {weights!r} are not numbers with commas between them, such as 0.5,0.5.") from error
