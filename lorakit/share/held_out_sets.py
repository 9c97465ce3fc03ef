"""The held-out rows of a run that was trained again: those of the run before, which stay held out, and those of the new
data. Both runs are compared on each of the two."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from lorakit.data.dataset import Examples
from lorakit.errors import UserError
from lorakit.evaluate.gate import Gate, judge_rows, trained_rows
from lorakit.evaluate.run import Evaluation
from lorakit.prepare import open_template, reopen_run
from lorakit.progress import Progress, Silent
from lorakit.recipe.schema import Recipe
from lorakit.run_dir import Run
from lorakit.run_inputs import RunRows
from lorakit.share.scores import value_at


def refuse_trained_rows(run: Run, recipe: Recipe, old_sources: int, base: str | None, progress: Progress) -> None:
    """Refuse a recipe that trains on rows which a run held out (UserError). `old_sources`: the first sources of the
    recipe's held-out rows that are the run's; their rows are the same where they become the same tokens."""
    manifest = run.read_manifest()
    recorded = value_at(manifest, "data", "tokens_sha256", "eval")
    if recorded is None and value_at(manifest, "data", "eval") is None:
        return
    rows = RunRows(recipe.data, open_template(recipe, progress)[1], progress)
    if rows.held_out and old_sources and _first_sources(rows.held_out, old_sources).tokens_sha256() == recorded:
        return
    before = reopen_run(run.folder, Silent(), base)[1].rows.read_or_warn("held_out")
    if before is None:
        return
    old = dict(_hashes(before))
    trained = [(where, old[row]) for row, where in _hashes(rows.train) if row in old]
    if trained:
        places = "; ".join(f"{where}, as {other}" for where, other in trained[:3])
        what = f"{len(trained):,} rows that this run held out would be trained on ({places})"
        raise UserError(f"{run.folder}: {what}. Hold them out again: data.eval says what is held out.")
    still = len(old.keys() & {row for row, _ in _hashes(rows.held_out)} if rows.held_out else ())
    if still < len(old):
        progress.warn(
            f"{run.folder}: held out {len(old):,} rows, of which {still:,} are held out now; none is trained on"
        )


def _first_sources(examples: Examples, count: int) -> Examples:
    """The examples of the first sources."""
    index, mask = examples.index, examples.index.source < count
    rows = np.zeros(int(index.owner.max(initial=-1)) + 1, bool)
    rows[index.owner[mask]] = True
    selected = np.flatnonzero(mask) if examples.selected is None else examples.selected[mask]
    return replace(examples, selected=selected, index=index.select(mask, rows))


def _hashes(examples: Examples) -> Iterator[tuple[bytes, str]]:
    """Of each example the hash of its tokens, and its place."""
    for row in examples.rows.select_columns(["input_ids", "where"]):
        yield blake2b(np.array(row["input_ids"], np.int32).tobytes(), digest_size=16).digest(), row["where"]


def compare_held_out(evaluation: Evaluation, old_sources: int, progress: Progress) -> list[Gate]:
    """The first model, trained again, against the second, on each of the two sets that has rows. Rows that one of the
    two was trained on are left out."""
    new, old = evaluation.models
    trained = trained_rows(evaluation, evaluation.models, None, progress)
    sources = np.array([row["source"] for row in new.rendered.rows])
    sets = {f"the held-out rows of {old.name}": sources < old_sources, "the new held-out rows": sources >= old_sources}
    for name, mask in sets.items():
        if not mask.any():
            progress.say(f"{name}: there are none")
    return [
        judge_rows(evaluation, new, old, trained, part=(name, mask))
        for name, mask in sets.items()
        if (mask & ~trained).any()
    ]
