"""`lorakit data`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.options import Json, Overrides, Quiet, RecipePath

if TYPE_CHECKING:
    from lorakit.data.chat_template import ChatTemplate
    from lorakit.data.survey import CheckSummary, Survey
    from lorakit.progress import Progress
    from lorakit.recipe.schema import Recipe

Show = Annotated[int, typer.Option("--show", min=0, metavar="N", help="Print N examples, their trained tokens marked.")]
OneRow = Annotated[
    str | None,
    typer.Option(
        "--row",
        metavar="FILE:LINE",
        help="Follow one row: what is trained of it, or why it is left out. Named as messages name it, such as "
        "[cyan]train.jsonl:12[/cyan] or [cyan]'train.parquet row 7'[/cyan].",
    ),
]
Write = Annotated[
    Path | None,
    typer.Option("--write", metavar="FILE", help="Write the rows that are kept, cleaned, as JSON Lines."),
]


def data(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    show: Show = 2,
    row: OneRow = None,
    write: Write = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a recipe's rows and say what is trained, what is left out and why.

    Formats, dropped and cut rows with file and line, lengths, what another max_length would cost, the checks of
    [cyan]data.clean[/cyan], and examples with their trained tokens marked. No weights are loaded.
    """
    from lorakit import console

    progress = console.Terminal(quiet)
    from lorakit.recipe.load import load

    checked = load(recipe, overrides)
    loaded = checked.recipe
    from lorakit.data.export import refuse_existing
    from lorakit.data.survey import survey
    from lorakit.plan.model_info import read_model_info
    from lorakit.plan.row_limits import beyond_training, refuse_lengths
    from lorakit.prepare import open_template, warn_of_tokenizer_differences

    if write is not None:
        refuse_existing(write)
    with checked.locating():
        base, template = open_template(loaded, progress)
        refuse_lengths(loaded, read_model_info(base.folder))
    if row is not None:
        _follow(row, loaded, template, as_json)
        return
    facts = read_model_info(base.folder)
    attention_at = facts.attention_at if facts else float("inf")
    found = survey(loaded.data, template, loaded.train.batch_size, loaded.train.seed, attention_at, progress)
    warn_of_tokenizer_differences(base, template.tokenizer, found.train, progress)
    too_long = beyond_training(loaded, facts, found.lengths["max"])
    if too_long:
        progress.warn(too_long)
    written = _write(write, loaded, found, progress) if write else None
    from lorakit.cli.draws import count_draws

    drawn = count_draws(found.train, loaded.train)
    for one in drawn:
        if one.warning:
            progress.warn(one.warning)
    if as_json:
        extra: dict[str, Any] = {"draws": [{"source": one.source.path, "epochs": one.epochs} for one in drawn]}
        extra |= {"written": {"file": str(write), "rows": written}} if write else {}
        console.result_json({**found.to_dict(), **extra, "examples": _samples(found, template, show)})
        _refuse(found)
        return
    from lorakit.cli.data_tables import print_survey

    print_survey(found, loaded.data, loaded.train.batch_size, drawn)
    for example in _samples(found, template, show):
        console.result_masked(f"\n{example['where']}:", example["stretches"])
    if write:
        console.result(f"{written:,} rows written: {write}")
    _refuse(found)


def _refuse(found: "Survey") -> None:
    """Say what would stop a run, once everything is told."""
    from lorakit.errors import UserError

    if found.stopping:
        checks = {check.name: check for check in found.checks if check.name in found.stopping}
        told = "; ".join(f"{check.rows:,} x {name} (first: {_first(check)})" for name, check in checks.items())
        keys = ", ".join(f"data.clean.{name}" for name in checks)
        raise UserError(f"a run would stop at these rows: {told}. Fix the rows, or write fix instead of error: {keys}.")


def _first(check: "CheckSummary") -> str:
    return next((cases[0] for cases in check.first.values() if cases), "-")


def _write(target: Path, recipe: "Recipe", found: "Survey", progress: "Progress") -> int:
    """Write every row that is trained or held out."""
    from lorakit.data.examples import ROW_CHECKS
    from lorakit.data.export import write_rows
    from lorakit.data.sources import sources_of

    # Held-out rows of a file of their own stand in no source of the training rows.
    sides = [found.train, found.held_out if isinstance(recipe.data.eval, float) else None]
    kept = {where for side in sides if side for where in side.rows["where"]}
    actions = recipe.data.clean.model_dump()
    checks = {check: actions[check] for check in ROW_CHECKS if actions[check] == "fix"}
    return write_rows(target, sources_of(recipe.data, recipe.data.train), checks, kept, progress)


def _samples(found: "Survey", template: "ChatTemplate", count: int) -> list[dict[str, Any]]:
    from lorakit.data.explain import split_by_trained
    from lorakit.data.survey import sample

    return [
        {"where": row["where"], "stretches": _texts(template, split_by_trained(row["input_ids"], row["labels"]))}
        for row in (sample(found.train, count) if count else [])
    ]


def _texts(template: "ChatTemplate", parts: list[tuple[list[int], bool]]) -> list[tuple[str, bool]]:
    return [(template.tokenizer.decode(ids), trained) for ids, trained in parts]


def _follow(row: str, recipe: "Recipe", template: "ChatTemplate", as_json: bool) -> None:
    """Print one row's examples, and what keeps it out or was found in it."""
    from lorakit import console
    from lorakit.data.examples import rules_of
    from lorakit.data.explain import explain_row, split_by_trained
    from lorakit.data.sources import all_sources

    explained = explain_row(row, all_sources(recipe.data), template, rules_of(recipe.data, None, survey=True))
    examples = [_texts(template, split_by_trained(ids, labels)) for ids, labels in explained.examples]
    if as_json:
        facts = {"where": explained.where, "examples": examples, "reasons": explained.reasons}
        console.result_json(facts)
        return
    for number, example in enumerate(examples, start=1):
        of = f", example {number} of {len(examples)}" if len(examples) > 1 else ""
        console.result_masked(f"{explained.where}{of}:", example)
    for reason in explained.reasons:
        console.result(f"{explained.where}: {reason}")
