"""Trainings by several processes, for tests."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rank_processes import outcomes_on, run_on

from lorakit.distributed.processes import is_first, on_first, together
from lorakit.prepare import prepare_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.run_dir import Run, open_run
from lorakit.train.checkpoint import checkpoint_to_resume, resumed_recipe
from lorakit.train.run import Outcome, train


def train_here(path: Path, folder: Path, overrides: tuple[str, ...] = (), resume: bool = False) -> Outcome:
    """What each process of `lorakit train` does, without the terminal."""
    loaded = load(path, [*overrides, f"output.dir={json.dumps(str(folder))}"])
    with ExitStack() as stack:

        def open_folder() -> Run:
            return stack.enter_context(open_run(folder, resume, overwrite=False)) if is_first() else Run(folder)

        run = together(open_folder)
        recipe = on_first(lambda: resumed_recipe(run, loaded)) if resume else loaded.recipe
        prepared = prepare_run(recipe, Silent())
        checkpoint = on_first(lambda: checkpoint_to_resume(run, prepared, Silent())) if resume else None
        return train(prepared, run, Silent(), checkpoint)


def train_on(count: int, path: Path, folder: Path, *overrides: str, resume: bool = False) -> tuple[Run, list[Outcome]]:
    """A training by `count` processes: its folder, and what each of them returned."""
    return Run(folder), run_on(count, train_here, path, folder, overrides, resume, **environment())


def failed_training_on(count: int, function: Any, *arguments: Any) -> list[tuple[str, Any]]:
    """Of each process the error that ended it, and its text; `function` is called instead of `train_here`."""
    return outcomes_on(count, function, *arguments, **environment())


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("LORAKIT_CACHE", "HF_HUB_OFFLINE", "ONEDNN_MAX_CPU_ISA")}
