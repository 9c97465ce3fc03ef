"""Finding lm-eval's tasks by name: those that come with it, and those of a folder of task files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager

from lorakit.errors import LorakitError, UserError
from lorakit.recipe.did_you_mean import nearest

# What load_dataset reads from files on this machine; any other dataset_path is a folder, or a dataset of the hub.
_FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text", "xml", "pandas")
_LISTED = 20


def load_tasks(names: Sequence[str], include: Path | None, allow_code: bool) -> dict[str, Any]:
    """The tasks and groups of these names with their data, as lm-eval's `evaluate` takes them.

    The 14,000 tasks that come with lm-eval take many seconds to list, and are listed only where `include` lacks a name.

    Raises:
        UserError: no such task, a broken task file, missing data, or a task that runs code without `allow_code`.
        LorakitError: a dataset could not be fetched from the hub.
    """
    manager = _open_manager(names, include)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        configs = list(_configs(manager.task_index, name))
        if not allow_code:
            for config in configs:
                _refuse_code(name, config)
        try:
            of_name = manager.load([name])
        except Exception as error:  # whatever a task file makes lm-eval, datasets or the file's own Python raise
            raise _loading_error(name, configs, error) from error
        for part, of_all in loaded.items():
            of_all.update(of_name.get(part, {}))
    return loaded


def _open_manager(names: Sequence[str], include: Path | None) -> Any:
    """lm-eval's index: of the folder alone, where all names are single tasks there, or else of everything."""
    own: list[str] = []
    if include is not None:
        _check_files(include)
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if all(name in manager.all_subtasks for name in names):
            return manager
        own = list(manager.all_tasks)
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name in manager.task_index:
            continue
        near = nearest(name, own) or nearest(name, manager.all_tasks)
        hint = f"; did you mean {near!r}?" if near else "."
        listed = ", ".join(own[:_LISTED]) + (", ..." if len(own) > _LISTED else "")
        where = f"{include} has: {listed or 'no task'}." if include else "--tasks-path FOLDER adds tasks of your own."
        raise UserError(f"--tasks: {name!r} is not a task{hint} {where}")
    return manager


def _check_files(include: Path) -> None:
    """lm-eval silently skips the files that it cannot read; here they are errors."""
    if not include.is_dir():
        raise UserError(f"--tasks-path: {include} is not a folder. Name the folder that holds the task files (*.yaml).")
    files = sorted(include.rglob("*.yaml"))
    if not files:
        raise UserError(f"--tasks-path: {include} holds no task files: they end in .yaml.")
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
            f"--tasks: {name} runs the Python that the model writes, on this machine and with your rights. Where that "
            "is acceptable, such as in a container without network, add --allow-code."
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
    remote = set()
    for config in configs:
        path, dataset = config.get("dataset_path"), config.get("dataset_name")
        if isinstance(path, str) and path not in _FILE_FORMATS and not Path(path).exists():
            remote.add(f"{path} ({dataset})" if dataset else path)
    # A hub that cannot be reached, and a dataset that is not there, are OSErrors in datasets and in huggingface_hub.
    if remote and (isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))):
        return LorakitError(
            f"--tasks: {name}: could not fetch its data from the hub: {', '.join(sorted(remote)[:_LISTED])}. It needs "
            "a network, once; without one, write a task on a local file (dataset_path: json) and name its folder with "
            f"--tasks-path. ({reason})"
        )
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"--tasks: {name}: could not find its data: {reason}. Paths in dataset_kwargs are relative to the folder "
            "in which lorakit is run; write absolute ones."
        )
    return UserError(f"--tasks: {name}: lm-eval cannot make a task of its file: {reason}")
