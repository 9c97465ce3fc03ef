"""Exporting: each target into a folder of its own, complete or absent, with export.json and a README."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorakit.atomic_io import LOCK, file_lock, files_in, remove_drafts, sha256_of
from lorakit.errors import LorakitError, UserError
from lorakit.export.source import Export, ExportSource
from lorakit.model.model_card import hub_id
from lorakit.output_dir import claim_output, output_draft, refuse_overwriting_inputs
from lorakit.progress import Progress
from lorakit.recipe.export_target import ExportTarget
from lorakit.run_dir import EXPORT, MERGED, Run, now, versions

FORMAT = 1
"""The version of export.json. It grows when a field is removed or changes its meaning."""


@dataclass(frozen=True)
class ExportResult:
    """One target as it was written."""

    target: ExportTarget
    folder: Path
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    export: Export

    def facts(self) -> dict[str, Any]:
        """The export as JSON."""
        checks = [asdict(check) for check in self.export.checks]
        return {"target": str(self.target), "folder": str(self.folder), **self.export.facts, "checks": checks}


@contextmanager
def shared_files(source: ExportSource, root: Path) -> Iterator[ExportSource]:
    """The source with a temporary folder, on the disk of the exports, for files that several targets are made from."""
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            refusal = f"{root}: another process is exporting into this folder. Wait, or stop it."
            stack.enter_context(file_lock(root / f"{LOCK}.shared", refusal))
            remove_drafts(root, "shared")  # of a process that was killed
            folder = stack.enter_context(TemporaryDirectory(dir=root, prefix=".lorakit-draft.shared."))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{root}: cannot be written: {reason}. Choose another with --output.") from error
        yield replace(source, shared=Path(folder))


def export(
    source: ExportSource, targets: Sequence[ExportTarget], root: Path, overwrite: bool, progress: Progress
) -> list[ExportResult]:
    """Write each target into a folder below `root`. A LorakitError where a check of what was written does not hold:
    that target is not put in place."""
    _refuse_place(source, root)
    with ExitStack() as stack:
        folders = [root / target.folder_name for target in targets]
        for folder in folders:  # all of them before the work on any
            stack.enter_context(claim_output(folder, overwrite, EXPORT))
        shared = stack.enter_context(shared_files(source, root))
        return [_export(shared, *one, progress) for one in zip(targets, folders, strict=True)]


def _refuse_place(source: ExportSource, root: Path) -> None:
    """Refuse a place inside of what is exported: the files there are known, and others would be in the way later."""
    place, run = root.resolve(), Run(source.folder)
    parts = [part for part in run.results() if part != run.exports] if run.holds_results() else [source.folder]
    own = default_root(source.folder).resolve()
    for part in (*parts, source.base.source, *([source.adapter] if source.adapter else [])):
        if place.is_relative_to(part.resolve()) and not place.is_relative_to(own):
            raise UserError(f"--output {root}: lies in {part}, which is exported. Choose another.")


def default_root(folder: Path) -> Path:
    """Where the exports of a run, an adapter or a model go: into export/ there; of a run's parts, into the run's."""
    outer = Run(folder.resolve().parent)
    is_part = outer.holds_results() and folder.resolve() in (outer.merged, outer.model)
    return outer.exports if is_part else folder / "export"


def _export(source: ExportSource, target: ExportTarget, folder: Path, progress: Progress) -> ExportResult:
    refuse_overwriting_inputs(folder, source.base.source, source.folder, *([source.adapter] if source.adapter else []))
    with output_draft(folder) as draft:
        written: Export = target.spec.function(source, target.argument, draft, progress)
        broken = [check for check in written.checks if not check.holds]
        for check in broken:
            progress.warn(f"{target}: {check.name}: {check.detail}")
        if any(check.fatal for check in broken):
            reasons = "; ".join(f"{check.name}: {check.detail}" for check in broken if check.fatal)
            raise LorakitError(
                f"{folder}: the export does not hold what was trained: {reasons}. It was not put in place."
            )
        heading = "" if written.is_card else f"# {source.name} for {target}\n\n"
        (draft / "README.md").write_text(f"{heading}{written.readme.strip()}\n", encoding="utf-8")
        names = files_in(draft)
        files = {name: {"bytes": (draft / name).stat().st_size, "sha256": sha256_of(draft / name)} for name in names}
        result = ExportResult(target, folder, files, written)
        (draft / EXPORT).write_text(_document(source, result), encoding="utf-8")
    return result


def _document(source: ExportSource, result: ExportResult) -> str:
    adapter = source.adapter / "adapter_model.safetensors" if source.adapter else None
    merge = None
    if result.export.facts.get("weights", result.target.spec.weights) != "adapter" and "merged_model" in vars(source):
        facts = source.merged_model / MERGED
        merge = json.loads(facts.read_text(encoding="utf-8")).get("proof") if facts.is_file() else None
    document = {
        "format": FORMAT,
        "exported": now(),
        "versions": versions(),
        # Names without paths, since exports are handed on: what they are is told by the sha256s.
        "source": source.folder.resolve().name,
        "base": {"name": hub_id(source.base.name) or Path(source.base.name).name, "origin": source.base.origin},
        "adapter_sha256": sha256_of(adapter) if adapter and adapter.is_file() else None,
        "merge_proof": merge,
        **{key: value for key, value in result.facts().items() if key != "folder"},
        "sha256": result.files,
        "files": sorted([*result.files, EXPORT]),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
