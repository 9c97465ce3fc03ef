"""`lorakit export RUN --ladder`: the rungs that are not there yet, then their scores and speeds side by side."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.evaluate.ladder import Ladder, RungFile, UnmergedFiles
    from lorakit.export.source import ExportSource
    from lorakit.prepare import GivenRows
    from lorakit.progress import Progress
    from lorakit.recipe.export_target import ExportTarget

_RUNGS = ("q8_0", "q4_k_m", "q2_k")


def refuse_without_run(given: str) -> None:
    """Refuse what is not a run, before anything is exported."""
    from lorakit.evaluate.models import argument_kind

    if argument_kind(given) != "run":
        raise UserError(f"--ladder: {given} is not a run, whose held-out rows its rungs are scored on. Give a run.")


def rung_targets() -> "list[ExportTarget]":
    """The rungs below full precision that every ladder has."""
    from lorakit.recipe.export_target import parse_target

    return [parse_target(f"gguf:{word}") for word in _RUNGS]


def climb(
    given: str,
    base: str | None,
    source: "ExportSource",
    targets: "Sequence[ExportTarget]",
    root: Path,
    overwrite: bool,
    rows: "tuple[int | None, GivenRows | None]",
    progress: "Progress",
) -> "tuple[Ladder, Path]":
    """Export the rungs of a run that are missing, score them all, and store that among the run's evaluations; what was
    found, and where it is stored. `targets`: what was exported before, GGUF files among which are rungs too. `rows`:
    how many, and which instead of the run's held-out ones."""
    from dataclasses import replace

    from lorakit.evaluate.ladder import score_ladder
    from lorakit.evaluate.ladder_report import ladder_document
    from lorakit.evaluate.models import run_folder
    from lorakit.evaluate.report import write_evaluation
    from lorakit.evaluate.run import default_settings
    from lorakit.prepare import reopen_run
    from lorakit.progress import Silent

    rungs = _export_rungs(source, targets, root, overwrite, progress)
    run, prepared = reopen_run(run_folder(given), Silent(), base)  # whose notes were shown before
    settings = default_settings(prepared)
    settings = replace(settings, rows=rows[0] or settings.rows)
    with _unmerged_files(source, root, rungs[0].name.lower(), progress) as unmerged:
        ladder = score_ladder(run, prepared, rungs, settings, progress, unmerged, rows[1])
    return ladder, write_evaluation(ladder.evaluation, run.evaluations, {"ladder": ladder_document(ladder)})


def _export_rungs(
    source: "ExportSource", targets: "Sequence[ExportTarget]", root: Path, overwrite: bool, progress: "Progress"
) -> "list[RungFile]":
    """The rungs, full precision first, then the largest first. What is there already from this adapter stays as it is,
    unless `overwrite` is True."""
    from lorakit.evaluate.ladder import RungFile
    from lorakit.export.gguf import lossless_type
    from lorakit.export.run import export
    from lorakit.recipe.export_target import parse_target

    full = parse_target(f"gguf:{lossless_type(source.merged_model)}")
    rungs = list(dict.fromkeys([full, *rung_targets(), *(one for one in targets if one.spec.name == "gguf")]))
    waiting = [rung for rung in rungs if rung not in targets]
    missing = [rung for rung in waiting if overwrite or not (root / rung.folder_name).exists()]
    if missing:
        export(source, missing, root, overwrite, progress)
    files = []
    for rung in rungs:
        facts = _read_export(root / rung.folder_name, source)
        path = root / rung.folder_name / str(facts["file"])
        files.append(RungFile(rung.argument.upper(), path, float(facts["fallback_share"])))
    return [files[0], *sorted(files[1:], key=lambda rung: -rung.bytes)]


def _read_export(folder: Path, source: "ExportSource") -> dict[str, Any]:
    """The export.json of a rung; a UserError if it is of another adapter, or its file has changed."""
    from lorakit.atomic_io import read_json_object, sha256_of
    from lorakit.run_dir import EXPORT

    facts = read_json_object(folder / EXPORT) or {}
    adapter = source.adapter / "adapter_model.safetensors" if source.adapter else None
    name, files = facts.get("file"), facts.get("sha256")
    recorded = files.get(name, {}).get("sha256") if isinstance(files, dict) else None
    path = folder / str(name)
    same = recorded is not None and path.is_file() and sha256_of(path) == recorded
    if not same or facts.get("adapter_sha256") != (sha256_of(adapter) if adapter else None):
        raise UserError(
            f"{folder}: is there already, and is not what this export makes: another adapter was exported, or a file "
            "has changed. Write --overwrite to replace all rungs, or --output with another folder."
        )
    return facts


@contextmanager
def _unmerged_files(
    source: "ExportSource", root: Path, word: str, progress: "Progress"
) -> "Iterator[UnmergedFiles | None]":
    """The base as a GGUF file of a type and the adapter as a GGUF LoRA, while they are measured; None where the adapter
    cannot be one, which is told with the reason."""
    from lorakit.evaluate.ladder import UnmergedFiles
    from lorakit.export.conversion import run_converter
    from lorakit.export.run import shared_files
    from lorakit.recipe.export_target import parse_target

    if source.adapter is None:
        yield None
        return
    with shared_files(source, root) as shared:
        assert shared.shared is not None
        try:
            written = parse_target("gguf-lora").spec.function(shared, "", shared.shared, progress)
        except UserError as error:
            progress.say(f"the adapter beside its base is not measured: {error}")
            yield None
            return
        adapter, base = shared.shared / str(written.facts["file"]), shared.shared / "base.gguf"
        progress.say(f"converting {source.base.name} to GGUF ({word})")
        run_converter("model", source.base.folder, base, source.llama_cpp, "--outtype", word)
        yield UnmergedFiles(base, adapter, base.stat().st_size + adapter.stat().st_size)


def ladder_json(ladder: "Ladder", path: Path) -> dict[str, Any]:
    """The ladder as the command prints it as JSON."""
    from lorakit.evaluate.ladder_report import ladder_document

    return {**ladder_document(ladder), "evaluation": str(path)}


def show_ladder(ladder: "Ladder", path: Path, name: str) -> None:
    """Print the ladder as a table, what its figures are, and what follows."""
    from lorakit import console
    from lorakit.evaluate.ladder_report import caption, conclude, ladder_table

    console.result_table(*ladder_table(ladder, name))
    console.result(f"{caption(ladder)}\n{conclude(ladder)}\nall figures and answers: {path}")
