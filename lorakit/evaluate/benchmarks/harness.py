"""lm-eval itself: its tasks by name, and its run, without its bars, its logging and its prints.

Imports lm-eval (the extra `tasks`): import this module only where a benchmark is run.
"""

import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import evaluate as metric_scripts
import huggingface_hub
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import lm_eval.tasks
import numpy as np
import torch
import yaml
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.benchmarks.confined_code import METRIC, ConfinedCode, check_confinement
from lorakit.evaluate.benchmarks.lm_eval_model import LmEvalModel
from lorakit.evaluate.benchmarks.local_data import LocalData
from lorakit.evaluate.benchmarks.settings import BenchmarkSettings
from lorakit.progress import Progress
from lorakit.recipe.did_you_mean import nearest

# What load_dataset reads from files on this machine; any other dataset_path is a folder, or a dataset of the hub.
_FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text", "xml", "pandas")
_LISTED = 20
_LM_EVALS_TASKS = Path(lm_eval.tasks.__file__).parent
# lm-eval's own defaults, so that the drawn examples are those of its command line.
_SEED_PYTHON, _SEED = 0, 1234
_MODULES_WITH_BARS = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
# Every model in memory, and every run without a chat template, is warned of these.
_USELESS_WARNINGS = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")


def load_tasks(settings: BenchmarkSettings) -> dict[str, Any]:
    """The tasks and groups with their data, as lm-eval's `evaluate` takes them. An error if there is no such task, its
    file or data cannot be read, or it runs code without `allow_code`."""
    names = list(dict.fromkeys(settings.tasks))
    local = None if settings.data is None else LocalData(settings.data)
    manager = _open_manager(names, settings.include)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        configs = list(_configs(manager.task_index, name))
        if not settings.allow_code:
            for config in configs:
                _refuse_code(name, config)
        if any(config.get("unsafe_code") for config in configs):
            check_confinement()
        try:
            with _own_sources(local):
                of_name = manager.load([name])
        except LorakitError:
            raise
        except Exception as error:  # whatever a task file makes lm-eval, datasets or the file's own Python raise
            raise _loading_error(name, configs, error) from error
        for part, of_all in loaded.items():
            of_all.update(of_name.get(part, {}))
    for name, task in loaded["tasks"].items():
        _refuse_unconfined_code(name, task)
    return loaded


@contextmanager
def _own_sources(local: LocalData | None) -> Iterator[None]:
    """Within it, tasks get `local` data where they ask for the hub's, and in place of the hub's metric that runs
    generated code one that confines it."""
    load_dataset, load_metric = datasets.load_dataset, metric_scripts.load

    def dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if local is None or path in _FILE_FORMATS or Path(path).exists():
            return load_dataset(path, name, **options)
        return local.load(path, name, **options)

    def metric(path: str, *given: Any, **options: Any) -> Any:
        return ConfinedCode() if path == METRIC else load_metric(path, *given, **options)

    datasets.load_dataset, metric_scripts.load = dataset, metric
    try:
        yield
    finally:
        datasets.load_dataset, metric_scripts.load = load_dataset, load_metric


def _refuse_unconfined_code(name: str, task: Any) -> None:
    """An error if a task runs generated code in a way of its own: none of its metrics has a `ConfinedCode`."""
    if not task.get_config("unsafe_code"):
        return
    functions = [getattr(function, "__self__", function) for function in task._metric_fn_list.values()]
    scopes = [getattr(function, "__globals__", {}) for function in (*functions, task.config.process_results)]
    if not any(isinstance(value, ConfinedCode) for scope in scopes for value in scope.values()):
        raise UserError(
            f"--tasks: {name} runs the code that models write by a program of its own, which lorakit cannot confine. "
            "Run it with lm-eval, in a container without network."
        )


def _open_manager(names: Sequence[str], include: Path | None) -> Any:
    """lm-eval's index: of the folder, and of lm-eval's own of the names (gsm8k, too, of gsm8k_cot), if these have each
    as a single task. All of lm-eval's 14,000 take ten seconds and more; groups and tags may have members anywhere."""
    if include is not None:
        _check_files(include)
    given = [] if include is None else [str(include)]
    users = TaskManager(include_path=given, include_defaults=False).all_tasks
    places = [(_LM_EVALS_TASKS / name, _LM_EVALS_TASKS / name.split("_")[0]) for name in names if name not in users]
    own = dict.fromkeys(str(next(filter(Path.is_dir, pair))) for pair in places if any(map(Path.is_dir, pair)))
    manager = TaskManager(include_path=[*own, *given], include_defaults=False)
    if all(name in manager.all_subtasks for name in names):
        return manager
    manager = TaskManager(include_path=given)
    for name in (name for name in names if name not in manager.task_index):
        near = nearest(name, users) or nearest(name, manager.all_tasks)
        hint = f"; did you mean {near!r}?" if near else "."
        listed = ", ".join(users[:_LISTED]) + (", ..." if len(users) > _LISTED else "")
        where = f"{include} has: {listed or 'no task'}." if include else "--tasks-path FOLDER adds tasks of your own."
        raise UserError(f"--tasks: {name!r} is not a task{hint} {where}")
    return manager


def _check_files(include: Path) -> None:
    """lm-eval silently skips the files that it cannot read; here they are errors."""
    files = sorted(include.rglob("*.yaml"))
    if not files:
        reason = "holds no task files: they end in .yaml" if include.is_dir() else "is not a folder of task files"
        raise UserError(f"--tasks-path: {include} {reason}.")
    for file in files:
        try:
            config = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
            raise UserError(f"{where}: this task file cannot be read: {getattr(error, 'problem', error)}.") from error
        if not isinstance(config, dict):
            raise UserError(f"{file}: a task file is a mapping of settings, such as `task: NAME`, and this is not.")
        includes = config.get("include", [])
        for other in includes if isinstance(includes, list) else [includes]:
            if not (file.parent / str(other)).is_file():
                raise UserError(f"{file}: include: there is no file {other} in {file.parent}.")


class _Loader(yaml.SafeLoader):
    """Reads `!function module.name` as its text."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _configs(index: Mapping[str, Any], member: Any) -> Iterator[dict[str, Any]]:
    """The settings of every single task that a name, or a member of a group, stands for."""
    if isinstance(member, str):
        if member not in index:
            raise UserError(f"--tasks: a group names the task {member!r}, which does not exist.")
        entry = index[member]
        for tagged in sorted(entry.tags) if entry.kind.name == "TAG" else []:
            yield from _configs(index, tagged)
        if entry.kind.name == "GROUP":
            yield from _configs(index, entry.cfg)
        elif entry.kind.name != "TAG":
            yield entry.cfg or {}
    elif isinstance(member.get("task"), list):
        for inner in member["task"]:
            yield from _configs(index, inner)
    elif member.get("task", member.get("group")) in index:
        for config in _configs(index, member.get("task", member.get("group"))):
            yield config | member
    else:
        yield member


def _refuse_code(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what runs code that nobody on this machine wrote. Loading such a task is enough to run some."""
    if config.get("unsafe_code"):
        raise UserError(
            f"--tasks: {name} runs the Python that the model writes. With --allow-code it runs here, in processes that "
            "cannot write files, use the network or start programs."
        )
    for metric in config.get("metric_list") or []:
        word = str(metric.get("metric"))
        of_a_file = "/" in word or config.get("process_results")  # lm-eval writes a !function as a path
        if of_a_file or (word in metric_registry and not metric.get("hf_evaluate")):
            continue
        meant = nearest(word, metric_registry.keys())
        raise UserError(
            f"--tasks: {name}: lm-eval has no metric {word!r}"
            + (f"; did you mean {meant!r}? Otherwise it" if meant else ". It")
            + " fetches a script of this name from the hub and runs it: where that is meant, add --allow-code."
        )


def _loading_error(name: str, configs: Sequence[Mapping[str, Any]], error: Exception) -> LorakitError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    of_tasks = {(str(config.get("dataset_path") or ""), config.get("dataset_name")) for config in configs}
    remote = sorted(
        f"{path} ({part})" if part else path
        for path, part in of_tasks
        if path and path not in _FILE_FORMATS and not Path(path).exists()
    )
    # A hub that cannot be reached, and a dataset that is not there, are OSErrors in datasets and in huggingface_hub.
    if remote and (isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))):
        return LorakitError(
            f"--tasks: {name}: could not fetch its data from the hub: {', '.join(remote[:_LISTED])}. It needs "
            "a network, once; without one, put the files into a folder and give it with --benchmark-data. "
            f"({reason})"
        )
    return UserError(
        f"--tasks: {name}: lm-eval cannot make a task of its file: {reason}. Paths in dataset_kwargs are relative to "
        "the folder in which lorakit is run."
    )


def run_lm_eval(lm_eval_model: LmEvalModel, loaded: Any, settings: BenchmarkSettings) -> Any:
    """lm-eval's results, with every sample, on the tasks that its TaskManager loaded. By `evaluate` and not
    `simple_evaluate`, which asks git, pip and the hub about this machine and this model. Tasks that insist on no
    examples get none, as there."""
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (settings.shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=settings.shots or 0)
        task.set_fewshot_seed(seed=_SEED)
    random.seed(_SEED_PYTHON)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    return evaluate(
        lm=lm_eval_model,
        task_dict=loaded,
        limit=settings.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=settings.chat,
        confirm_run_unsafe_code=settings.allow_code,
    )


@contextmanager
def quiet_lm_eval(progress: Progress) -> Iterator[None]:
    """Bars off, lm-eval's prints to standard error, and its warnings, one of a kind, to the user. Telemetry is off too:
    datasets reports each data set that is read, a local file too, unless it is offline."""
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = metric_scripts.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.disable_progress_bars()
    bars = [(module, module.tqdm) for module in _MODULES_WITH_BARS]
    logger, handler = logging.getLogger("lm_eval"), _WarningHandler(progress)
    level, propagate = logger.level, logger.propagate
    try:
        for module, tqdm in bars:
            module.tqdm = _without_bar(tqdm)
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = level, propagate
        for module, tqdm in bars:
            module.tqdm = tqdm


def _without_bar(tqdm: Any) -> Any:
    return lambda *given, **options: tqdm(*given, **{**options, "disable": True})


class _WarningHandler(logging.Handler):
    """Passes on the first warning from each place in lm-eval: most of them come once a row."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._seen: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text, place = record.getMessage(), (record.pathname, record.lineno)
        if place not in self._seen and not text.startswith(_USELESS_WARNINGS):
            self._seen.add(place)
            self._progress.warn(f"lm-eval: {' '.join(text.split())[:300]}")
