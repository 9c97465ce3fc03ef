"""Several runs' adapters in one: combined, scored on each run's held-out rows, and folded into the base."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.atomic_io import atomic_dir, remove_drafts
from lorakit.merge.card import FACTS as MERGE_FACTS
from lorakit.merge.case import MergeResult
from lorakit.merge.combine import FACTS, CombineResult, check_options, combine
from lorakit.merge.run import claim_output, merge, refuse_overwriting_inputs
from lorakit.merge.score import SourceScore, score_sources
from lorakit.merge.sources import check_same_base
from lorakit.merge.writer import explain_full_disk
from lorakit.prepare import reopen_run
from lorakit.progress import Progress
from lorakit.run_dir import Run


@dataclass(frozen=True)
class CombineRunsResult:
    """A combination of adapters, and what is known of it."""

    combined: CombineResult
    scores: list[SourceScore]
    without: list[str]
    """Runs that have no held-out rows to score on."""
    merged: MergeResult | None


def combine_runs(
    runs: Sequence[Run],
    combination: tuple[str, Sequence[float], float | None, int | None, int | None],
    output: Path,
    overwrite: bool,
    into_base: dict[str, Any] | None,
    progress: Progress,
) -> CombineRunsResult:
    """Combine the adapters of runs on one base, into an adapter or, with the options of `merge`, into a merged model.

    Args:
        combination: method, weights, density, seed and rank, as `combine` takes them.

    Raises:
        UserError: the options or the runs do not go together, or something else lies at `output`.
        LorakitError: the merged model does not predict what the combined adapter predicts.
    """
    method, weights, density, seed, rank = combination
    check_options(len(runs), weights, method, density, seed, rank)
    check_same_base(runs, progress)
    with ExitStack() as held:
        for run in runs:
            held.enter_context(run.shared())
        held.enter_context(claim_output(output, overwrite, FACTS if into_base is None else MERGE_FACTS))
        return _combine(runs, combination, output, into_base, progress)


def _combine(
    runs: Sequence[Run],
    combination: tuple[str, Sequence[float], float | None, int | None, int | None],
    output: Path,
    into_base: dict[str, Any] | None,
    progress: Progress,
) -> CombineRunsResult:
    method, weights, density, seed, rank = combination
    opened = [reopen_run(run.folder, progress) for run in runs]
    refuse_overwriting_inputs(output, *(run.folder for run in runs), *(prepared.base.folder for _, prepared in opened))
    first, prepared = opened[0]
    with tempfile.TemporaryDirectory(prefix="lorakit-combined.") as folder:
        draft = Path(folder) / output.absolute().name  # by which its card calls it
        combined = combine(
            [run.adapter for run, _ in opened],
            weights,
            method,
            prepared.base.folder,
            draft,
            density=density,
            seed=seed,
            rank=rank,
            tokenizer=prepared.tokenizer,
        )
        scores, without = score_sources(opened, draft, progress)
        merged = None
        if into_base is None:
            _put_in_place(draft, output)
        else:
            merged = merge(first, prepared, output, progress, adapter=draft, **into_base)
    combined = replace(combined, folder=output)
    return CombineRunsResult(combined, scores, without, merged)


def _put_in_place(draft: Path, output: Path) -> None:
    with explain_full_disk(output):
        remove_drafts(output.absolute().parent, output.name)
        with atomic_dir(output) as folder:
            for file in (path for path in draft.rglob("*") if path.is_file()):
                place = folder / file.relative_to(draft)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
