"""Models on lm-eval's tasks: one load of each base, each model against the baseline, as tables and as a document.

Figures are lm-eval's own. Intervals and comparisons are lorakit's, from the value of every sample, because lm-eval's
standard errors are wrong for a share near 0 or 1 and do not compare two models on the same rows.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit.data.template_source import with_fixed_date
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.benchmarks.published import differences
from lorakit.evaluate.benchmarks.settings import BenchmarkSettings
from lorakit.evaluate.benchmarks.task_score import TaskScore, task_scores
from lorakit.evaluate.inference import ModelLoader, loading_order
from lorakit.evaluate.metric import Comparison, compare
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import load_tokenizers, prompt_template
from lorakit.evaluate.report import Table, comparison_table, describe_model, document_heading, score_table
from lorakit.model.block_code import use_inference_code
from lorakit.progress import Progress

FORMAT = 1


def run_benchmark(
    model_set: ModelSet, settings: BenchmarkSettings, baseline: str, progress: Progress
) -> tuple[dict[str, Any], list[Table]]:
    """Every model on every task, as a document and as tables. `baseline`: the name of the model that the others are
    compared with. An error if lm-eval is not installed, or a task cannot be used in this way or fails."""
    served = [spec.given for spec in model_set.specs if spec.endpoint]
    if served:
        raise UserError(
            f"{served[0]}: lm-eval's tasks need likelihoods, which a server's chat answers have not. Leave it out; "
            "lorakit eval scores its answers."
        )
    files = [spec.given for spec in model_set.specs if spec.gguf]
    if files:
        raise UserError(
            f"{files[0]}: lm-eval's tasks run on models of torch here, not on GGUF files. Leave it out, or give the "
            "folder that it was made from; lorakit eval scores GGUF files."
        )
    tasks, tokenizers = open_tasks(settings, progress), load_tokenizers(model_set, progress)
    for spec, tokenizer in zip(model_set.specs, tokenizers, strict=True):
        if settings.chat and not tokenizer.chat_template:
            raise UserError(f"--chat-template: the tokenizer of {spec.given} has no chat template. Leave it out.")
    loader = ModelLoader(model_set.machine.device)
    scores: dict[str, list[TaskScore]] = {spec.name: [] for spec in model_set.specs}
    for at in loading_order(model_set.specs):
        spec = model_set.specs[at]
        template = prompt_template(spec, tokenizers[at], model_set)
        tokenizer, label = with_fixed_date(tokenizers[at], template.date), f"{spec.name}: tasks"
        model = loader.model_of(spec)
        scores[spec.name] = run_tasks(model, tokenizer, tasks, settings, progress, template.variables, label)
    others = {name: of_model for name, of_model in scores.items() if name != baseline}
    compared = {name: compare_tasks(scores[baseline], of_model, settings.seed) for name, of_model in others.items()}
    machine = model_set.machine
    document = {
        **document_heading(FORMAT, machine),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "notes": differences(scores[baseline], settings.chat),
        "baseline": baseline,
        "subjects": {spec.name: describe_model(spec, machine.device) for spec in model_set.specs},
        "models": {name: [score.to_dict() for score in of_model] for name, of_model in scores.items()},
        "comparisons": {
            model: {name: one and one.to_dict() for name, one in of_model.items()}
            for model, of_model in compared.items()
        },
    }
    # The figures asked for with models as columns, and each model against the baseline.
    by_model = {model: {one.name: one for one in of_model if not one.within} for model, of_model in scores.items()}
    tables = [score_table("benchmarks", by_model)]
    for model, of_model in compared.items():
        scored = [(name, of_model.get(name), one.measure) for name, one in by_model[baseline].items()]
        rows = [(name, one, measure) for name, one, measure in scored if one and measure]
        tables += [comparison_table(f"{model} against {baseline}", rows)] if rows else []
    return document, tables


def open_tasks(settings: BenchmarkSettings, progress: Progress) -> dict[str, Any]:
    """lm-eval's tasks and groups with their data, for any number of models. An error if lm-eval is not installed, or a
    task cannot be used in this way."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: benchmarks need the package lm-eval: pip install 'lorakit[tasks]'.")
    from lorakit.evaluate.benchmarks.harness import load_tasks, quiet_lm_eval

    with quiet_lm_eval(progress):
        return load_tasks(settings)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    settings: BenchmarkSettings,
    progress: Progress,
    variables: Mapping[str, Any] | None = None,
    label: str = "tasks",
) -> list[TaskScore]:
    """The figures of `open_tasks`' tasks, groups and their members, in lm-eval's order. `model`: a causal language
    model, or a PEFT model around one; it stays as it is. `variables`: what the chat template is given besides the
    messages."""
    from lorakit.evaluate.benchmarks.harness import quiet_lm_eval, run_lm_eval
    from lorakit.evaluate.benchmarks.lm_eval_model import LmEvalModel

    names = list(dict.fromkeys(settings.tasks))
    with quiet_lm_eval(progress):
        lm_eval_model = LmEvalModel(model, tokenizer, variables if settings.chat else None, label, progress)
        try:
            with use_inference_code(model):
                results = run_lm_eval(lm_eval_model, tasks, settings)
        except LorakitError:
            raise
        except Exception as error:  # whatever a task's own Python, its template or its data make lm-eval raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            raise LorakitError(f"--tasks {','.join(names)}: lm-eval fails: {reason}") from error
    return task_scores(results, tasks, names, settings.seed)


def compare_tasks(
    first: Sequence[TaskScore], second: Sequence[TaskScore], seed: int = 0
) -> dict[str, Comparison | None]:
    """The second model against the first, by figure's name; None for a figure without an interval. An error if they
    have different rows."""
    others = {score.name: score for score in second}
    comparisons: dict[str, Comparison | None] = {}
    for one, other in ((one, others[one.name]) for one in first if one.name in others):
        if one.rows_of != other.rows_of:
            raise LorakitError(
                f"{one.name}: one model was scored on {len(one.rows_of)} rows and the other on {len(other.rows_of)}, "
                "which are not the same: a paired difference needs the same. Run both with the same --limit and data."
            )
        comparisons[one.name] = None
        if one.measure is not None and other.measure is not None:
            comparisons[one.name] = compare({"": one.measure}, {"": other.measure}, seed)[""]
    return comparisons
