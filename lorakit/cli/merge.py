"""`lorakit merge`"""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.merge_options import (
    BasePlace,
    DataFile,
    Density,
    Dtype,
    Extract,
    Folders,
    IntoBase,
    KeepWhole,
    Method,
    NoProof,
    Onto,
    Output,
    Overwrite,
    Rank,
    Seed,
    Verify,
    Weights,
)
from lorakit.cli.options import Json, Quiet
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.merge.inputs import MergeInput
    from lorakit.progress import Progress
    from lorakit.run_dir import Run

# What each way of using the command takes; any other option that is given would do nothing, and is refused.
_ONE = {"onto", "dtype", "no_proof", "output", "overwrite"}
_PLACES = {"base", "data"}
_TAKES = {
    "one run": _ONE | _PLACES,
    "several runs": {"method", "weights", "density", "seed", "rank", "into_base", "output", "overwrite"},
    "several runs with --into-base": _ONE | {"method", "weights", "density", "seed", "rank", "into_base"},
    "--extract": {"extract", "rank", "keep_whole", "output", "overwrite"},
    "--verify": {"verify"} | _PLACES,
}


def merge(
    folders: Folders,
    onto: Onto = None,
    output: Output = None,
    dtype: Dtype = None,
    no_proof: NoProof = False,
    base: BasePlace = None,
    data: DataFile = None,
    overwrite: Overwrite = False,
    method: Method = None,
    weights: Weights = None,
    density: Density = None,
    seed: Seed = None,
    into_base: IntoBase = False,
    extract: Extract = None,
    rank: Rank = None,
    keep_whole: KeepWhole = False,
    verify: Verify = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold an adapter, a run's or one alone, into its base model, and prove it.

    The base's files are gone through tensor by tensor, so that a model need not fit into memory. The merged files are
    then compared with the adapter model on held-out rows, and put in place only when both predict the same; else the
    exit code is 1.
    """
    values = {name: value for name, value in locals().items() if name not in ("folders", "as_json", "quiet")}
    given = {name for name, value in values.items() if value is not None and value is not False}
    way = _way(folders, given)
    from lorakit import console

    progress = console.Terminal(quiet)
    if way == "--extract":
        _extract(extract, folders[0], rank, output, overwrite, keep_whole, as_json, progress)
        return
    if way == "--verify":
        _verify(verify, folders[0], (base, data), as_json, progress)
        return
    options = {"onto": onto or "trained", "dtype": dtype, "proved": not no_proof}
    if way == "one run":
        _one(folders[0], output, overwrite, (base, data), options, as_json, progress)
        return
    combination = (method or "", _numbers(weights), density, seed, rank)
    _several(folders, combination, output, overwrite, options if into_base else None, as_json, progress)


def _way(folders: list[Path], given: set[str]) -> str:
    """Which of the command's uses is meant.

    Raises:
        UserError: none, or an option was given that it does not take.
    """
    if {"extract", "verify"} <= given:
        raise UserError("--extract and --verify: one of them, not both.")
    way = next((word for word in ("--extract", "--verify") if word[2:] in given), None)
    if way and len(folders) != 1:
        takes = "the base model" if way == "--extract" else "the run"
        raise UserError(f"{way}: takes one folder besides its own, {takes}; {len(folders)} were given.")
    if way is None:
        several = "several runs with --into-base" if "into_base" in given else "several runs"
        way = several if len(folders) > 1 else "one run"
    needless = sorted(given - _TAKES[way])
    if needless:
        takers = [word for word, taken in _TAKES.items() if needless[0] in taken]
        name = needless[0].replace("_", "-")
        raise UserError(f"--{name}: does nothing with {way}. Leave it out; it goes with {' or '.join(takers)}.")
    if way.startswith("several"):
        for name in ("method", "weights", "output"):
            if name not in given:
                raise UserError(
                    f"--{name}: is missing. Several runs are combined by lorakit merge A B --method cat --weights "
                    "0.5,0.5 --output DIR."
                )
    if way == "--extract":
        for name in ("rank", "output"):
            if name not in given:
                raise UserError(
                    f"--{name}: is missing. Write lorakit merge --extract TUNED BASE --rank 32 --output DIR."
                )
    return way


def _numbers(weights: str | None) -> list[float]:
    try:
        return [float(part) for part in (weights or "").split(",")]
    except ValueError as error:
        raise UserError(f"--weights: {weights!r} are not numbers with commas between them, such as 0.5,0.5.") from error


def _one(
    folder: Path,
    output: Path | None,
    overwrite: bool,
    places: tuple[str | None, Path | None],
    options: Any,
    as_json: bool,
    progress: "Progress",
) -> None:
    from lorakit import console
    from lorakit.cli.merge_texts import merged_facts, merged_text
    from lorakit.cli.next_commands import after_merge
    from lorakit.merge.run import claim_output, merge_input

    run = _run_of(folder)
    target = output or (run.merged if run else folder / "merged")
    with run.shared() if run else nullcontext(), claim_output(target, overwrite):
        given = _input(folder, run, places, progress)
        merged = merge_input(given, target, progress, **options)
    if as_json:
        console.result_json(merged_facts(merged))
    else:
        console.result(merged_text(merged))
        console.result(f"next: {after_merge(given, merged)}")


def _run_of(folder: Path) -> "Run | None":
    """The run that a folder is, or whose adapter it is; None where it is an adapter alone.

    Raises:
        UserError: it is neither.
    """
    from lorakit.run_dir import Run

    run = Run(folder)
    outer = Run(folder.resolve().parent)
    if not run.holds_results() and (folder / "adapter_config.json").is_file():
        return outer if outer.holds_results() and outer.adapter == folder.resolve() else None
    run.read_manifest()
    return run


def _input(
    folder: Path, run: "Run | None", places: tuple[str | None, Path | None], progress: "Progress"
) -> "MergeInput":
    from lorakit.merge.inputs import input_of_adapter, input_of_run
    from lorakit.prepare import reopen_run

    base, data = places
    if run is None:
        return input_of_adapter(folder, base, progress, data)
    return input_of_run(*reopen_run(run.folder, progress, base), progress, data)


def _verify(
    folder: Path | None,
    given: Path,
    places: tuple[str | None, Path | None],
    as_json: bool,
    progress: "Progress",
) -> None:
    from lorakit import console
    from lorakit.cli.merge_texts import merged_facts, verified_text
    from lorakit.merge.verify import verify_input

    assert folder is not None
    if not folder.is_dir():
        raise UserError(f"--verify {folder}: there is no such folder.")
    found = verify_input(_input(given, _run_of(given), places, progress), folder, progress)
    if as_json:
        console.result_json(merged_facts(found))
    else:
        console.result(verified_text(found, given))


def _several(
    folders: list[Path],
    combination: tuple[Any, ...],
    output: Path | None,
    overwrite: bool,
    options: Any,
    as_json: bool,
    progress: "Progress",
) -> None:
    from lorakit import console
    from lorakit.cli.merge_texts import combined_facts, combined_table, combined_text, merged_facts, merged_text
    from lorakit.merge.combine_runs import combine_runs
    from lorakit.run_dir import Run

    assert output is not None
    runs = [Run(folder) for folder in folders]
    made = combine_runs(runs, combination, output, overwrite, options, progress)
    if as_json:
        console.result_json(combined_facts(made) | (merged_facts(made.merged) if made.merged else {}))
        return
    if made.scores:
        console.result_table(*combined_table(made))
    console.result(combined_text(made))
    if made.merged:
        console.result(merged_text(made.merged))


def _extract(
    tuned: Path | None,
    base: Path,
    rank: int | None,
    output: Path | None,
    overwrite: bool,
    keep_whole: bool,
    as_json: bool,
    progress: "Progress",
) -> None:
    from lorakit import console
    from lorakit.atomic_io import remove_drafts
    from lorakit.cli.merge_texts import extracted_facts, extracted_table, extracted_text
    from lorakit.merge.extract import FACTS, extract
    from lorakit.merge.run import claim_output, refuse_overwriting_inputs
    from lorakit.model.resolve import resolve_base
    from lorakit.model.tokenizer import quiet_libraries

    assert tuned is not None and rank is not None and output is not None
    quiet_libraries()
    with claim_output(output, overwrite, FACTS):
        found = [resolve_base(str(folder), "main", progress) for folder in (tuned, base)]
        refuse_overwriting_inputs(output, *(model.folder for model in found))
        remove_drafts(output.absolute().parent, output.name)
        extracted = extract(found[0], found[1], rank, output, progress, keep_whole=keep_whole)
    if as_json:
        console.result_json(extracted_facts(extracted))
        return
    if extracted.left:
        console.result_table(*extracted_table(extracted))
    console.result(extracted_text(extracted))
