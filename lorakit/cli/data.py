"""`lorakit data`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.options import Json, Overrides, Quiet, RecipePath
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.data.chat_template import ChatTemplate
    from lorakit.data.survey import Survey
    from lorakit.progress import Progress
    from lorakit.recipe.schema import Recipe


def data(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    show: Annotated[
        int, typer.Option("--show", min=0, metavar="N", help="Print N examples, their trained tokens marked.")
    ] = 2,
    row: Annotated[
        str | None,
        typer.Option(
            "--row",
            metavar="FILE:LINE",
            help="Follow one row: what is trained of it, or why it is left out. Named as messages name it, such as "
            "[cyan]train.jsonl:12[/cyan] or [cyan]'train.parquet row 7'[/cyan].",
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE", help="Write the rows that are kept, cleaned, as JSON Lines."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a recipe's rows and show what is trained, what is left out and why.

    Formats, dropped and cut rows with file and line, lengths, what another max_length would cost, the checks of
    [cyan]data.clean[/cyan], and examples with their trained tokens marked. No weights are loaded.
    """
    from lorakit import console
    from lorakit.recipe.load import load

    progress = console.Terminal(quiet)
    loaded = load(recipe, overrides)
    settings = loaded.recipe
    from lorakit.cli.data_tables import count_draws, print_survey
    from lorakit.data.export import check_target
    from lorakit.data.mixture import rows_per_step
    from lorakit.data.survey import survey
    from lorakit.plan.model_info import beyond_training, read_model_info, refuse_by_config
    from lorakit.prepare import open_template, warn_of_tokenizer_differences

    if write is not None:
        check_target(write)
    with loaded.locating():
        base, template = open_template(settings, progress)
        info = read_model_info(base.folder)
        refuse_by_config(settings, info)
    if row is not None:
        _print_row(row, settings, template, as_json)
        return
    attention_at = info.attention_at if info else float("inf")
    result = survey(settings.data, template, settings.train, attention_at, progress)
    batch_size = rows_per_step(settings.train, result.train.report.mean_length)
    warn_of_tokenizer_differences(base, template.tokenizer, result.train, progress)
    drawn = count_draws(result.train, settings.train.model_copy(update={"batch_size": batch_size}))
    written = _write(write, settings, result, progress) if write else None
    for warning in (beyond_training(settings, info, result.lengths["max"]), *(one.warning for one in drawn)):
        if warning:
            progress.warn(warning)
    examples = _samples(result, template, show)
    if as_json:
        facts = result.to_dict() | {"draws": [{"source": one.path, "epochs": one.epochs} for one in drawn]}
        facts |= {"written": {"file": str(write), "rows": written}} if write else {}
        console.result_json(facts | {"examples": examples})
    else:
        print_survey(result, settings.data, batch_size, drawn)
        for example in examples:
            console.result_masked(f"\n{example['where']}:", example["stretches"])
        if write:
            console.result(f"{written:,} rows written: {write}")
    if result.stopping:
        raise UserError(_why_a_run_would_stop(result))


def _why_a_run_would_stop(result: "Survey") -> str:
    findings = {check: result.findings[check] for check in result.stopping}
    first = {check: next(cases[0] for cases in one.first.values()) for check, one in findings.items()}
    rows = [f"{one.total:,} x {check} (first: {first[check]})" for check, one in findings.items()]
    keys = ", ".join(f"data.clean.{check}" for check in result.stopping)
    return f"a run would stop at these rows: {'; '.join(rows)}. Fix the rows, or write fix instead of error: {keys}."


def _write(target: Path, recipe: "Recipe", result: "Survey", progress: "Progress") -> int:
    from lorakit.data.examples import ROW_CHECKS
    from lorakit.data.export import write_rows
    from lorakit.data.sources import sources_of
    from lorakit.recipe.fields import is_split

    # Held-out rows of a separate file are in no source of the training rows.
    sides = [result.train, result.held_out if is_split(recipe.data.eval) else None]
    places = {where for side in sides if side for where in side.rows["where"]}
    actions = recipe.data.clean.model_dump()
    checks = {check: actions[check] for check in ROW_CHECKS if actions[check] == "fix"}
    return write_rows(target, sources_of(recipe.data, recipe.data.train), checks, places, progress)


def _samples(result: "Survey", template: "ChatTemplate", count: int) -> list[dict[str, Any]]:
    from lorakit.data.survey import decode_by_trained, sample

    rows = sample(result.train, count) if count else []
    texts = [decode_by_trained(template.tokenizer, row["input_ids"], row["labels"]) for row in rows]
    return [{"where": row["where"], "stretches": text} for row, text in zip(rows, texts, strict=True)]


def _print_row(row: str, recipe: "Recipe", template: "ChatTemplate", as_json: bool) -> None:
    """Print one row's examples, and what keeps it out or the checks found in it."""
    from lorakit import console
    from lorakit.data.examples import rules_of
    from lorakit.data.sources import all_sources
    from lorakit.data.survey import decode_by_trained, explain_row

    rules = rules_of(recipe.data, None, survey=True)
    where, encoded, reasons = explain_row(row, all_sources(recipe.data), template, rules)
    examples = [decode_by_trained(template.tokenizer, one["input_ids"], one["labels"]) for one in encoded]
    if as_json:
        console.result_json({"where": where, "examples": examples, "reasons": reasons})
        return
    for number, example in enumerate(examples, start=1):
        of = f", example {number} of {len(examples)}" if len(examples) > 1 else ""
        console.result_masked(f"{where}{of}:", example)
    for reason in reasons:
        console.result(f"{where}: {reason}")
