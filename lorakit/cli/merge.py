"""`lorakit merge`"""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.devices import on_devices, terminal_of_first
from lorakit.cli.options import (
    BaseOption,
    Devices,
    Dtype,
    Json,
    NoProof,
    Onto,
    Overwrite,
    Quiet,
    RowColumns,
    RowFormat,
    given_rows,
    quoted,
)
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.merge.inputs import MergeInput
    from lorakit.merge.run import MergeResult
    from lorakit.run_dir import Run


def merge(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run, or of an adapter in PEFT's format."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where to write; by default merged/ in that folder."),
    ] = None,
    overwrite: Overwrite = False,
    onto: Onto = None,
    dtype: Dtype = None,
    base: BaseOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Rows to prove the merge on; by default the run's held-out set, or general texts where there is none.",
        ),
    ] = None,
    row_format: RowFormat = None,
    columns: RowColumns = None,
    no_proof: NoProof = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            "--verify", metavar="MERGED", help="Prove an existing merge again, such as one that someone sent."
        ),
    ] = None,
    devices: Devices = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add an adapter to the weights of its base model, and prove the result.

    The base's files are read tensor by tensor, so a model need not fit into memory. The merged model is then compared
    with the adapter model on held-out rows, and put in place only if both predict the same; if not, the exit code is 1.

    [bold]lorakit combine[/bold] makes one adapter of several, [bold]lorakit extract[/bold] one out of two models.
    """
    from lorakit import console
    from lorakit.distributed.processes import is_first

    rows, run = given_rows(data, row_format, columns), _run_of(folder)
    if rows and no_proof:
        raise UserError("--data: does nothing with --no-proof, which reads no rows. Leave it out.")
    if verify is not None:
        writing = {"output": output, "overwrite": overwrite, "onto": onto, "dtype": dtype, "no-proof": no_proof}
        for option, value in writing.items():
            if value:
                raise UserError(f"--{option}: does nothing with --verify, which writes nothing. Leave it out.")
        if not verify.is_dir():
            raise UserError(f"--verify {verify}: there is no such folder.")
    # It computes on the processor, where several processes have no more threads in all than one.
    with on_devices(devices, remedy=lambda: "Nothing was put in place: start again.", starts=devices is not None):
        progress = terminal_of_first(quiet)

        def read_input() -> "MergeInput":
            from lorakit.merge.inputs import input_of_adapter, input_of_run
            from lorakit.prepare import reopen_run

            if run is None:
                return input_of_adapter(folder, base, progress, rows)
            return input_of_run(*reopen_run(run.folder, progress, base), progress, rows)

        if verify is not None:
            from lorakit.merge.run import verify as prove_again

            merged = prove_again(read_input(), verify, progress)
            first, following = f"{verify}: is the merged model of {folder}", ""
        else:
            from lorakit.distributed.sharing import opened_by_first
            from lorakit.merge.run import merge as merge_adapter
            from lorakit.output_dir import claim_output

            target = output or (run.merged if run else folder / "merged")
            with run.shared() if run else nullcontext(), opened_by_first(lambda: claim_output(target, overwrite)):
                given = read_input()
                merged = merge_adapter(given, target, progress, onto or "trained", dtype, not no_proof)
            first, following = f"merged model: {merged.folder}", f"\nnext: {_next_command(given, merged, base)}"
        if not is_first():
            return
    if as_json:
        console.result_json(merged.facts())
    else:
        console.result("\n".join([first, *merged.in_words()]) + following)


def _next_command(given: "MergeInput", merged: "MergeResult", base: str | None) -> str:
    """The evaluation that compares a merged model with its adapter and its base, which --base named."""
    own = given.is_run and merged.folder.resolve() == given.folder.resolve() / "merged"
    models = [quoted(given.folder), *([] if own else [quoted(merged.folder)]), *([] if given.is_run else ["base"])]
    with_rows = given.names_held_out and merged.rows_of in ("", "held-out")
    where = "" if base is None else f" --base {shlex.quote(base)}"
    return f"lorakit eval {' '.join(models)}{where}" + ("" if with_rows else " --data FILE")


def _run_of(folder: Path) -> "Run | None":
    """The run that a folder is, or whose adapter it is; None where it is an adapter alone, an error where it is
    neither."""
    from lorakit.run_dir import Run, suggest_run

    run, outer = Run(folder), Run(folder.resolve().parent)
    if not run.holds_results() and (folder / "adapter_config.json").is_file():
        return outer if outer.holds_results() and outer.adapter == folder.resolve() else None
    if not run.holds_results() and (folder / "config.json").is_file():
        remedy = suggest_run(folder) or "Give the folder of a run or of an adapter."
        raise UserError(f"{folder}: is a model, which has no adapter to merge. {remedy}")
    run.read_manifest()
    return run
