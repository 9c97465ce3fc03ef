"""Models on lm-eval's tasks: one load of each base, each model against the baseline, as tables and as a document.

Figures are lm-eval's own. Intervals and comparisons are lorakit's, from the value of every sample, because lm-eval's
standard errors are wrong for a share near 0 or 1 and do not compare two models on the same rows.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.template_source import with_fixed_date
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.inference import ModelLoader, loading_order
from lorakit.evaluate.intervals import Comparison, compare
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import load_tokenizers, prompt_template
from lorakit.evaluate.report import (
    COMPARISON_COLUMNS,
    Table,
    comparison_row,
    describe_model,
    document_heading,
    score_table,
)
from lorakit.progress import Progress

if TYPE_CHECKING:
    from lorakit.evaluate.benchmarks.figures import TaskScore

FORMAT = 1


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which tasks to run, and how.

    `include`: a folder of task files, searched first; they are programs, whose templates and `!function`s run. `limit`:
    the first rows of every single task, None for all. `chat`: put prompts into the chat template, few-shot examples as
    turns. `allow_code`: run what the model writes where a task asks for it (HumanEval), and metric scripts of the hub.
    `seed`: of the intervals; few-shot examples are drawn with lm-eval's own seeds.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    chat: bool = False
    allow_code: bool = False
    seed: int = 0


def run_benchmark(
    model_set: ModelSet, settings: BenchmarkSettings, baseline: str, progress: Progress
) -> tuple[dict[str, Any], list[Table]]:
    """Every model on every task, as a document and as tables. `baseline`: the name of the model that the others are
    compared with. An error if lm-eval is not installed, or a task cannot be used in this way or fails."""
    loader, tokenizers = ModelLoader(model_set.machine.device), load_tokenizers(model_set, progress)
    scores: dict[str, list[TaskScore]] = {spec.name: [] for spec in model_set.specs}
    for at in loading_order(model_set.specs):
        spec = model_set.specs[at]
        template = prompt_template(spec, tokenizers[at], model_set)
        tokenizer, label = with_fixed_date(tokenizers[at], template.date), f"{spec.name}: tasks"
        scores[spec.name] = run_tasks(loader.model_of(spec), tokenizer, settings, progress, template.variables, label)
    others = {name: of_model for name, of_model in scores.items() if name != baseline}
    compared = {name: compare_tasks(scores[baseline], of_model, settings.seed) for name, of_model in others.items()}
    machine = model_set.machine
    document = {
        **document_heading(FORMAT, machine),
        "settings": asdict(settings) | {"include": str(settings.include) if settings.include else None},
        "baseline": baseline,
        "subjects": {spec.name: describe_model(spec, machine.device) for spec in model_set.specs},
        "models": {name: [score.to_dict() for score in of_model] for name, of_model in scores.items()},
        "comparisons": {
            model: {name: one and one.to_dict() for name, one in of_model.items()}
            for model, of_model in compared.items()
        },
    }
    return document, _tables(scores, compared, baseline)


def _tables(
    scores: "dict[str, list[TaskScore]]", compared: dict[str, dict[str, Comparison | None]], baseline: str
) -> list[Table]:
    """The figures asked for with models as columns, and each model against the baseline."""
    by_model = {model: {one.name: one for one in of_model if not one.within} for model, of_model in scores.items()}
    tables = [score_table("benchmarks", by_model)]
    for model, of_model in compared.items():
        scored = [(name, of_model.get(name), one.measure) for name, one in by_model[baseline].items()]
        rows = [comparison_row(name, one, measure) for name, one, measure in scored if one and measure]
        if rows:
            tables.append((f"{model} against {baseline}", COMPARISON_COLUMNS, rows))
    return tables


def run_tasks(
    model: Any,
    tokenizer: Any,
    settings: BenchmarkSettings,
    progress: Progress,
    variables: Mapping[str, Any] | None = None,
    label: str = "tasks",
) -> "list[TaskScore]":
    """The figures of these tasks, groups and their members, in lm-eval's order. `model`: a causal language model, or a
    PEFT model around one; it stays as it is. `variables`: what the chat template is given besides the messages."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: benchmarks need the package lm-eval: pip install 'lorakit[tasks]'.")
    if settings.chat and not tokenizer.chat_template:
        raise UserError("--tasks: this tokenizer has no chat template to put prompts into. Leave --chat-template out.")
    names = list(dict.fromkeys(settings.tasks))
    from lorakit.evaluate.benchmarks.figures import task_scores
    from lorakit.evaluate.benchmarks.harness import LmEvalModel, load_tasks, quiet_lm_eval, run_lm_eval

    with quiet_lm_eval(progress):
        loaded = load_tasks(names, settings.include, settings.allow_code)
        lm_eval_model = LmEvalModel(model, tokenizer, variables if settings.chat else None, label, progress)
        try:
            results = run_lm_eval(lm_eval_model, loaded, settings.limit, settings.chat, settings.allow_code)
        except LorakitError:
            raise
        except Exception as error:  # whatever a task's own Python, its template or its data make lm-eval raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            raise LorakitError(f"--tasks {','.join(names)}: lm-eval fails: {reason}") from error
    return task_scores(results, loaded, names, settings.seed)


def compare_tasks(
    first: "Sequence[TaskScore]", second: "Sequence[TaskScore]", seed: int = 0
) -> dict[str, Comparison | None]:
    """The second model against the first, by figure's name; None for a figure without an interval. A LorakitError if
    they were scored on different rows."""
    others = {score.name: score for score in second}
    comparisons: dict[str, Comparison | None] = {}
    for one, other in ((one, others[one.name]) for one in first if one.name in others):
        if one.rows_of != other.rows_of:
            raise LorakitError(
                f"{one.name}: one model was scored on {one.rows} rows and the other on {other.rows}, which are not the "
                "same: a paired difference needs the same rows. Run both with the same --limit and data."
            )
        comparisons[one.name] = None
        if one.measure is not None and other.measure is not None:
            comparisons[one.name] = compare({"": one.measure}, {"": other.measure}, seed)[""]
    return comparisons
