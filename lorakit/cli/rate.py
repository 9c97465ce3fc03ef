"""`lorakit rate`: people as judges"""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.eval import MaxNewTokens, Models, NoCache, Quantizations, open_models
from lorakit.cli.options import BaseOption, Json, OutputFolder, Quiet
from lorakit.errors import UserError


def sheet(
    output: OutputFolder,
    questions: Annotated[
        Path,
        typer.Option(
            "--questions", metavar="FILE", help="What the models answer, one question a line.", show_default=False
        ),
    ],
    models: Models = [],  # noqa: B006
    quantizations: Quantizations = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the order of the answers.")] = 0,
    no_cache: NoCache = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another sheet in the folder.")] = False,
    base: BaseOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page on which people rate the answers of several models, without seeing whose they are.

    The page works in any browser without a network. Raters export a file from it; [cyan]lorakit rate report[/cyan]
    reads these files with the key that stays with you.
    """
    from lorakit import console

    progress = console.Terminal(quiet)
    with open_models(models, quantizations, progress, base=base) as model_set:
        from lorakit.evaluate.rating.sheet import LETTERS, answer_questions, read_questions, write_sheet
        from lorakit.evaluate.run import default_settings

        tokens = max_new_tokens or default_settings(model_set.prepared).max_new_tokens
        questions_read = read_questions(questions)
        if not 2 <= (models_named := len(model_set.specs)) <= len(LETTERS):
            raise UserError(f"a sheet compares 2 to {len(LETTERS)} models, and these are {models_named}. Name others.")
        answers = answer_questions(model_set, questions_read, tokens, not no_cache, progress)
        name = str(model_set.prepared.recipe.name) if model_set.prepared else output.name
        written = write_sheet(output, name, questions_read, answers, seed, overwrite)
    if as_json:
        console.result_json(written.to_dict())
        return
    console.result(
        f"for raters: {written.page} ({written.questions} questions, {written.answers} answers)\n"
        f"keep to yourself: {written.key}\n"
        f"then: lorakit rate report ratings-*.json --key {written.key}"
    )


def report(
    ratings: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What raters exported from the page.", show_default=False)
    ],
    key: Annotated[
        Path,
        typer.Option("--key", metavar="FILE", help="The key.json of the sheet, or its folder.", show_default=False),
    ],
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the intervals.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Report on ratings: each model's scores with intervals, verdicts, and how far the raters agree.

    No model is needed.
    """
    from lorakit import console
    from lorakit.evaluate.rating.ratings import rating_tables, read_ratings, report_ratings

    facts = report_ratings(read_ratings(ratings, key), seed)
    progress = console.Terminal(quiet)
    for note in facts["notes"]:
        progress.warn(note)
    if as_json:
        console.result_json(facts)
        return
    for table in rating_tables(facts):
        console.result_table(*table)
