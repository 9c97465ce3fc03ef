"""The rows to be scored against each model's positions, before anything is loaded."""

from collections.abc import Mapping, Sequence

from lorakit.errors import UserError
from lorakit.evaluate.labels import Labels
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import RenderedRows
from lorakit.model.positions import Positions
from lorakit.plan.model_info import read_model_info
from lorakit.plan.row_limits import unseen


def compare_lengths(
    model_set: ModelSet, each: Sequence[RenderedRows], labels: Mapping[int, Mapping[str, Labels]], answers: int
) -> list[str]:
    """What the user should know of rows that come near the end of a model's positions, or go beyond it.

    Args:
        labels: those of each rendering, by its id. answers: the most tokens of an answer; 0 where none is generated.

    Raises:
        UserError: a model cannot compute a row.
    """
    notes = []
    for spec, rendered in zip(model_set.specs, each, strict=True):
        facts = read_model_info(spec.base.folder)
        if facts is None or facts.positions is None:
            continue
        prompts = [len(prompt) for prompt in rendered.prompts]
        notes += _notes(spec, facts.positions, rendered, _with_labels(rendered, labels[id(rendered)]), prompts, answers)
    return list(dict.fromkeys(notes))


def _notes(
    spec: EvalModelSpec, positions: Positions, rendered: RenderedRows, labelled: int, prompts: list[int], answers: int
) -> list[str]:
    limit = positions.limit
    rows = [len(row["input_ids"]) for row in rendered.rows]
    longest = max([*rows, labelled])
    if not positions.hard:
        longest = max([longest, *(prompt + answers for prompt in prompts)])
        what = f"{spec.name}: a row with its answer takes up to {longest:,} tokens, {unseen(positions)}"
        return [what] if longest > limit else []
    if longest > limit:
        where = rendered.rows[rows.index(max(rows))]["where"]
        beyond = sum(row > limit for row in rows)
        raise UserError(
            f"{spec.name}: {beyond or 1:,} of {len(rows):,} rows go beyond the model's {limit:,} positions "
            f"({positions.key}), for which alone it has embeddings; the longest, {where}, takes {longest:,} tokens. "
            f"Leave longer rows out: write data.max_length: {limit} in the recipe, or shorter rows."
        )
    cut = sum(prompt + answers > limit + 1 for prompt in prompts) if answers else 0
    if not cut:
        return []
    return [
        f"{spec.name}: after {cut:,} of {len(prompts):,} prompts there is no room for {answers:,} tokens: the "
        f"model has {limit:,} positions ({positions.key}). Answers end there"
    ]


def _with_labels(rendered: RenderedRows, labels: Mapping[str, Labels]) -> int:
    """The tokens of the longest prompt with the longest of its labels."""
    found = [
        rendered.rows[row]["answer"] + max(map(len, one.tokens))
        for one in labels.values()
        for row in one.rows
        if one.tokens
    ]
    return max(found, default=0)
