"""What the tests of training share: a run in process, and what it left."""

import json
from pathlib import Path

from safetensors.torch import load_file

from lorakit.prepare import prepare_run
from lorakit.progress import Progress, Silent
from lorakit.recipe.load import load
from lorakit.run_dir import Run, open_run
from lorakit.train.checkpoint import checkpoint_to_resume, resumed_recipe
from lorakit.train.run import Outcome, train

SILENT = Silent()


def run_recipe(
    path: Path, folder: Path, *overrides: str, resume: bool = False, progress: Progress = SILENT
) -> tuple[Run, Outcome]:
    """What `lorakit train` does, without the terminal."""
    loaded = load(path, [*overrides, f"output.dir={json.dumps(str(folder))}"])
    with open_run(folder, resume, overwrite=False) as run:
        prepared = prepare_run(resumed_recipe(run, loaded) if resume else loaded.recipe, progress)
        checkpoint = checkpoint_to_resume(run, prepared, progress) if resume else None
        return run, train(prepared, run, progress, checkpoint)


def adapter_weights(run: Run) -> dict:
    return load_file(run.adapter / "adapter_model.safetensors")


def losses(run: Run) -> list[float]:
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
