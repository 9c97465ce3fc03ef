"""`lorakit merge`"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.options import Json, Quiet, RunFolder

Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; default is RUN/merged.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a merged model that is there already.")]


def merge(
    run: RunFolder, output: Output = None, overwrite: Overwrite = False, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Fold a run's adapter into its base model, and prove it.

    The merged files are read back and compared with the adapter model on held-out rows. They are put in place only
    when both predict the same; else the exit code is 1.
    """
    from lorakit import console

    progress = console.Terminal(quiet)
    from lorakit.merge.run import check_target
    from lorakit.merge.run import merge as merge_run
    from lorakit.plan.prepare import reopen_run

    opened, prepared = reopen_run(run, progress)
    target = output or opened.merged
    check_target(opened, target, overwrite)
    proof = merge_run(opened, prepared, target, progress)
    if as_json:
        console.result_json({"merged": str(target), "proof": asdict(proof)})
        return
    console.result(
        f"merged model: {target}\n"
        f"proved on {proof.positions:,} positions of {proof.rows} rows: largest logit difference "
        f"{proof.max_logit_difference:.3g} of {proof.logit_scale:.3g}, mean KL {proof.mean_kl:.2e} nats, "
        f"top-1 agreement {proof.top1_agreement:.2%}, loss {proof.merged_loss:.4f} (adapter {proof.adapter_loss:.4f})"
    )
