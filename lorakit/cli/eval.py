"""`lorakit eval`, and what the commands that score models share: options, the models named, where results go."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.devices import on_devices, terminal_of_first
from lorakit.cli.options import BaseOption, Devices, Json, Quiet, RowColumns, RowFormat, given_rows
from lorakit.cli.report import refresh_report
from lorakit.errors import LorakitError, UserError

if TYPE_CHECKING:
    from lorakit.evaluate.gate import Gate
    from lorakit.evaluate.models import Choice, ModelSet
    from lorakit.evaluate.run import Evaluation
    from lorakit.progress import Progress

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="X...",
        help="A run, a recipe (its base, before training), an adapter's or a model's folder, a GGUF file, a hub id, "
        "the address of an OpenAI-compatible server ([cyan]http://host:port/v1[/cyan], [cyan]#NAME[/cyan] after it "
        "where it serves several), or [cyan]base[/cyan]. One run alone means its base, its adapter and its merged "
        "model.",
        show_default=False,
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="X",
        help="What the others are compared with: the base, else the first, or that of --not-worse-than.",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, metavar="N", help="The longest answer, instead of the recipe's."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Compute everything anew, and store nothing.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Where the files go; the default is eval/ of the first run."),
]
Quantizations = Annotated[
    str | None,
    typer.Option(
        "--quantizations",
        metavar="A,B",
        help="Also run adapters on their base in these quantizations: none, q8, q4, nf4.",
    ),
]
NOT_STORED = "not stored: no run is among the models. --output DIR says where scores and answers go"
_WRONG = "What may have gone wrong"
_GATE = "A gate for a pipeline"
_RIVAL = "Prompting as a rival"


def evaluate(
    models: Models = [],  # noqa: B006
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows to score on, instead of the first run's held-out rows."),
    ] = None,
    row_format: RowFormat = None,
    columns: RowColumns = None,
    base: BaseOption = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="A,B", help="Metrics of generated answers, instead of the recipe's."),
    ] = None,
    turns: Annotated[
        Literal["last", "all"] | None,
        typer.Option("--turns", help="Which answers of a row are generated, instead of the recipe's evaluate.turns."),
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, metavar="N", help="Score the first N rows.")] = None,
    baseline: Baseline = None,
    fail_under: Annotated[
        list[str],
        typer.Option(
            "--fail-under",
            metavar="METRIC=VALUE",
            help="Exit with 1 where a model's score is worse, except the baseline. May be given several times.",
            show_default=False,
            rich_help_panel=_GATE,
        ),
    ] = [],  # noqa: B006
    not_worse_than: Annotated[
        str | None,
        typer.Option(
            "--not-worse-than",
            metavar="RUN",
            help="Exit with 1 where the 95 % interval says that a model is worse than this run, adapter or model on "
            "the same rows. What the rows cannot tell passes, and is said.",
            show_default=False,
            rich_help_panel=_GATE,
        ),
    ] = None,
    judged: Annotated[
        list[str],
        typer.Option(
            "--on",
            metavar="METRIC[=MARGIN]",
            help="A score that --not-worse-than judges, and by how much it may be worse, such as "
            "[cyan]json-valid=2%[/cyan]; by default the loss and each metric. May be given several times.",
            show_default=False,
            rich_help_panel=_GATE,
        ),
    ] = [],  # noqa: B006
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the intervals.")] = 0,
    no_cache: NoCache = False,
    output: Output = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Also score general texts and training rows, to see forgetting and memorization.",
            rich_help_panel=_WRONG,
        ),
    ] = False,
    general: Annotated[
        Path | None,
        typer.Option(
            "--general",
            metavar="FILE",
            help="General texts of your own, rows with 'text', instead of the bundled ones.",
            rich_help_panel=_WRONG,
        ),
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option(
            "--few-shot",
            metavar="K",
            min=0,
            max=100,
            help="Also score the base with K training rows as examples in its prompt; 0 leaves out what the recipe's "
            "evaluate.baselines says.",
            rich_help_panel=_RIVAL,
        ),
    ] = None,
    few_shot_by: Annotated[
        Literal["seed", "similar"] | None,
        typer.Option(
            "--few-shot-by",
            help="Which rows: the same ones for all questions, drawn by the run's seed (the default), or those most "
            "similar to each question.",
            rich_help_panel=_RIVAL,
        ),
    ] = None,
    system_file: Annotated[
        Path | None,
        typer.Option(
            "--system-file",
            metavar="FILE",
            help="Also score the base with this text as its system prompt; with --few-shot, with both.",
            rich_help_panel=_RIVAL,
        ),
    ] = None,
    quantizations: Quantizations = None,
    devices: Devices = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score models side by side on the same held-out rows.

    Loss and perplexity are taken on every trained token, metrics on greedy answers, each with its 95 % interval; then
    each model's difference from the baseline, and whether it is better. Scores and answers are stored in the run's
    eval/ folder.
    """
    from lorakit import console
    from lorakit.distributed.processes import is_first

    if metrics is not None:
        metrics_of(metrics)
    if judged and not_worse_than is None:
        raise UserError("--on: is of the scores that --not-worse-than RUN judges. Add it, or leave --on out.")
    given = given_rows(data, row_format, columns)
    with on_devices(devices, remedy=lambda: "Start again." if no_cache else "The same command goes on from the cache."):
        progress = terminal_of_first(quiet)
        with open_models(models, quantizations, progress, base=base, reference=not_worse_than) as model_set:
            from lorakit.evaluate.diagnosis.examination import create_examination
            from lorakit.evaluate.diagnosis.finding import describe_finding
            from lorakit.evaluate.gate import find_failures, find_reference, judge, parse_limits
            from lorakit.evaluate.report import evaluation_document, write_evaluation
            from lorakit.evaluate.run import EvalSettings, default_settings, score_models

            model_set = _with_rival(model_set, few_shot, few_shot_by, system_file)
            recipe = default_settings(model_set.prepared)
            chosen = recipe.metrics if metrics is None else metrics_of(metrics, recipe.metrics)
            tokens = max_new_tokens or recipe.max_new_tokens
            at = find_reference(model_set, not_worse_than) if not_worse_than else None
            if at is not None and "base" not in [spec.kind for spec in model_set.specs]:
                baseline = baseline or model_set.specs[at].name
            which = turns or recipe.turns
            settings = EvalSettings(chosen, tokens, rows or recipe.rows, seed, not no_cache, baseline, which)
            examined = create_examination(model_set, general) if diagnose or general else None
            thresholds = parse_limits("--fail-under", fail_under, settings.metrics)
            limits = parse_limits("--on", judged, settings.metrics, optional=True)
            folder = results_folder(model_set, output) if is_first() else None
            evaluation = score_models(model_set, given, settings, progress, examined)
            if not is_first():
                return
            reference = None if at is None else evaluation.models[at]
            failed = find_failures(evaluation, thresholds, reference)
            gates = judge(evaluation, reference, limits, given, progress) if reference else []
            more = {"gates": [gate.to_dict() for gate in gates]} if reference else {}
            path = write_evaluation(evaluation, folder, more) if folder else None
            if path and model_set.run and folder == model_set.run.evaluations:
                refresh_report(model_set.run, progress)
    worse = [failure for gate in gates for failure in gate.failures]
    if as_json:
        facts = {"file": str(path) if path else None, "failed": [*failed, *worse]}
        console.result_json({**evaluation_document(evaluation), **more, **facts})
    else:
        _print_tables(evaluation, gates, path, quiet)
    for name, finding in ((name, finding) for name, of in evaluation.findings.items() for finding in of):
        if finding.flagged:
            progress.warn(f"{name}: {describe_finding(finding)}")
    is_final = (given, rows, turns, max_new_tokens) == (None,) * 4  # measured as the recipe says
    if is_final and path and model_set.run and path.parent == model_set.run.evaluations:
        _track_scores(evaluation, progress)
    reasons = {"--fail-under": failed, "--not-worse-than": worse}
    if failed or worse:
        raise LorakitError(" ".join(f"{option}: {'; '.join(of)}." for option, of in reasons.items() if of))


def _print_tables(evaluation: "Evaluation", gates: "Sequence[Gate]", path: Path | None, quiet: bool) -> None:
    """What was measured, as tables and sentences, how to measure a prompt (unless `quiet`), and where it was stored."""
    from lorakit import console
    from lorakit.evaluate.report import gate_table, tables

    prepared = evaluation.model_set.prepared
    title = str(prepared.recipe.name) if prepared else ", ".join(evaluation.parts[""].scores)
    settings_of = [model.spec.settings for model in evaluation.models]
    words = {one.quantization for one in settings_of if one} - {"none"}
    for table in tables(evaluation, title + (f" (base in {', '.join(sorted(words))})" if words else "")):
        console.result_table(*table)
    for gate in gates:
        console.result_table(*gate_table(gate))
    if evaluation.missing_rival and not quiet:
        console.result_wrapped(evaluation.missing_rival, under="  ")
    console.result(f"every answer: {path.with_suffix('.jsonl')}" if path else NOT_STORED)
    for one in evaluation.prompting:
        console.result_wrapped(str(one), under="  ")


def _track_scores(evaluation: "Evaluation", progress: "Progress") -> None:
    """Send the scores of the first run's base, adapter and merged model on its held-out rows to its trackers."""
    from lorakit.track.tracking import track_scores

    run, prepared = evaluation.model_set.run, evaluation.model_set.prepared
    if not (run and prepared and prepared.recipe.track):
        return
    scores: dict[str, dict[str, float]] = {}
    for model in evaluation.models:
        spec = model.spec
        is_own = spec.prepared is prepared or spec.given == str(run.folder)
        if is_own and spec.prompting is None and spec.kind != "gguf":
            scores.setdefault(spec.kind, model.scores)  # the first one: those after it are on other quantizations
    try:
        with run.shared():
            track_scores(run, prepared.recipe.track, scores, progress)
    except UserError as error:  # a training has begun in the folder meanwhile
        progress.warn(str(error))


def _with_rival(
    models: "ModelSet", few_shot: int | None, choose: "Choice | None", system_file: Path | None
) -> "ModelSet":
    """The models, and the base with the prompt of the options, or of the recipe's `evaluate.baselines` where the base
    is scored."""
    from lorakit.evaluate.prompting import add_prompted_model, chosen_prompting

    system = None
    if system_file is not None:
        try:
            system = system_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--system-file: {system_file}: cannot be read: {error}.") from error
        if not system:
            raise UserError(f"--system-file: {system_file}: is empty. Write the system text into it.")
    prompting = chosen_prompting(models.prepared.recipe if models.prepared else None, few_shot, choose, system)
    if choose and not (prompting and prompting.few_shot):
        raise UserError("--few-shot-by: no examples are asked for. Add --few-shot K, or leave this out.")
    of_recipe = few_shot is None and system is None
    if prompting is None or (of_recipe and all(spec.kind != "base" for spec in models.specs)):
        return models
    return add_prompted_model(models, prompting)


@contextmanager
def open_models(
    named: list[str],
    quantizations: str | None,
    progress: "Progress",
    servers_alone: bool = False,
    base: str | None = None,
    reference: str | None = None,
) -> "Iterator[ModelSet]":
    """The models of the arguments, runs among them locked against a training that would replace them. `servers_alone`:
    whether a server may be without a run or model. `base`: where the base of runs and adapters lies now. `reference`:
    a model that is one of them too, the last where it is not named."""
    from lorakit.evaluate.models import add_quantizations, lock_runs, place_of, resolve_models
    from lorakit.registry import QUANTIZERS

    words = [word.strip() for word in quantizations.split(",")] if quantizations is not None else []
    for word in words:
        if word not in QUANTIZERS:
            names = ", ".join(QUANTIZERS.names())
            raise UserError(f"--quantizations: {word!r} is not a quantization. Write some of {names}.")
    if not named:
        raise UserError("no model is named. Give the folder of a run, such as runs/NAME.")
    if reference is not None and place_of(reference) not in map(place_of, named):
        named = [*named, reference]
    elif reference is not None and len(named) == 1:
        raise UserError(f"--not-worse-than {reference}: is the model that is judged. Name another one.")
    with lock_runs(named):
        models = resolve_models(named, progress, servers_alone, base)
        yield add_quantizations(models, list(dict.fromkeys(words))) if words else models


def results_folder(models: "ModelSet", output: Path | None) -> Path | None:
    """Where scores are stored: the folder named, else that of the first run; None where there is neither. One that
    cannot be written or created is refused, before hours of work."""
    folder = output or (models.run.evaluations if models.run else None)
    if folder:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            reason = "cannot be written" if there.is_dir() else f"{there} is a file"
            raise UserError(f"--output: {folder}: {reason}. Give --output DIR, a folder for scores and answers.")
    return folder


def metrics_of(named: str, recipes: Sequence[Any] | None = None) -> tuple[Any, ...]:
    """The metrics of `--metrics a,b`, with the settings that the recipe gives them. Without one, names are checked."""
    from lorakit.recipe.fields import entry_name
    from lorakit.recipe.suggestions import nearest_word
    from lorakit.registry import METRICS

    configured, names = {entry_name(metric): metric for metric in recipes or ()}, [*map(str.strip, named.split(","))]
    for name in names:
        if name not in METRICS:
            near = nearest_word(name, METRICS.names())
            remedy = f"Did you mean {near}?" if near else f"There are {', '.join(METRICS.names())}."
            raise UserError(f"--metrics: {name!r} is not a metric. {remedy}")
        if names.count(name) > 1:
            raise UserError(f"--metrics: {name} is there twice. Leave one out.")
        settings = METRICS[name].settings
        needed = [key for key, field in settings.model_fields.items() if field.is_required()] if settings else []
        if needed and recipes is not None and name not in configured:
            raise UserError(
                f"--metrics: {name} needs settings ({', '.join(needed)}), which only a recipe can give: write it under "
                "evaluate.metrics there."
            )
    return tuple(configured.get(name, name) for name in names)
