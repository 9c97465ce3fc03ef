"""The options of `lorakit eval`."""

from pathlib import Path
from typing import Annotated

import typer

_PEOPLE, _WRONG, _TASKS = "People as judges", "What may have gone wrong", "Benchmarks"

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="X...",
        help="A run, an adapter's or a model's folder, a hub id, or [cyan]base[/cyan]. One run alone means its base, "
        "its adapter and its merged model.",
        show_default=False,
    ),
]
DataFile = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Rows to score on, instead of the first run's held-out rows."),
]
Metrics = Annotated[
    str | None, typer.Option("--metrics", metavar="A,B", help="Metrics of generated answers, instead of the recipe's.")
]
Rows = Annotated[int | None, typer.Option("--rows", min=1, metavar="N", help="Score the first N rows.")]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="X", help="What the others are compared with: the base, else the first."),
]
FailUnder = Annotated[
    list[str],
    typer.Option(
        "--fail-under",
        metavar="METRIC=VALUE",
        help="Exit with 1 where a model's score is worse, except the baseline. May be given several times.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, metavar="N", help="The longest answer, instead of the recipe's."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the intervals, and of a sheet's order.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Compute everything anew, and keep nothing.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Where the files go; the default is eval/ of the first run."),
]
SheetFolder = Annotated[
    Path | None,
    typer.Option("--sheet", metavar="DIR", help="Write a page for people to rate answers.", rich_help_panel=_PEOPLE),
]
Questions = Annotated[
    Path | None,
    typer.Option("--questions", metavar="FILE", help="What the models answer on it.", rich_help_panel=_PEOPLE),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another sheet in the folder.", rich_help_panel=_PEOPLE)
]
RatingFiles = Annotated[
    list[Path],
    typer.Option(
        "--ratings",
        metavar="FILE...",
        help="Report what raters exported from the page; no model is needed.",
        show_default=False,
        rich_help_panel=_PEOPLE,
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="The key.json of the sheet.", rich_help_panel=_PEOPLE),
]
Diagnose = Annotated[
    bool,
    typer.Option(
        "--diagnose",
        help="Also score general texts and training rows, to see forgetting and memorization.",
        rich_help_panel=_WRONG,
    ),
]
General = Annotated[
    Path | None,
    typer.Option(
        "--general",
        metavar="FILE",
        help="General texts of your own, rows with 'text', instead of the bundled ones.",
        rich_help_panel=_WRONG,
    ),
]
Quantizations = Annotated[
    str | None,
    typer.Option(
        "--quantizations",
        metavar="A,B",
        help="Score adapters on their base in these quantizations too: none, q8, q4, nf4.",
        rich_help_panel=_WRONG,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="A,B",
        help="Tasks of lm-eval (pip install 'lorakit\\[tasks]'), such as mmlu,gsm8k, instead of the held-out rows.",
        rich_help_panel=_TASKS,
    ),
]
TasksPath = Annotated[
    Path | None,
    typer.Option(
        "--tasks-path",
        metavar="DIR",
        help="Task files of your own. They are programs: their templates run.",
        rich_help_panel=_TASKS,
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="The first N rows of a task.", rich_help_panel=_TASKS)
]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Put tasks into the chat template.", rich_help_panel=_TASKS)
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Run code that models write, where a task asks it.", rich_help_panel=_TASKS),
]
