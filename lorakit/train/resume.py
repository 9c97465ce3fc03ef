"""Resuming: which checkpoint a run goes on from, and whether it is still the same run."""

from pathlib import Path
from typing import Any

from lorakit.data.examples import file_sha256s, tokenizer_sha256
from lorakit.errors import UserError
from lorakit.plan.prepare import Prepared, check_base
from lorakit.progress import Progress
from lorakit.recipe.load import Loaded, load
from lorakit.recipe.schema import Recipe
from lorakit.runs import Run

# What may differ when a run goes on: where it lies, what is kept of it, what follows it, and what never changes it.
_FREE = ("name", "output", "evaluate", "train.keep", "train.micro_batch", "train.gradient_checkpointing")


def resumed_recipe(run: Run, loaded: Loaded) -> Recipe:
    """The recipe of the begun run, with every `auto` as it was settled then.

    Raises:
        UserError: the recipe given now says something else.
    """
    if not run.recipe.is_file():
        return loaded.recipe
    begun = load(run.recipe).recipe
    now, then = _flat(loaded.recipe.model_dump()), _flat(begun.model_dump())
    differing = [
        f"{key}: {then.get(key)} then, {value} now ({loaded.where(key)})"
        for key, value in now.items()
        if value != "auto" and then.get(key) != value and not key.startswith(_FREE)
    ]
    if differing:
        lines = "\n".join(f"  - {line}" for line in differing)
        raise UserError(
            f"{run.folder}: this run was begun with another recipe:\n{lines}\nResume with the recipe it was begun with "
            f"({run.recipe}), or train into another folder with --output."
        )
    changed = {key: value for key, value in now.items() if key.startswith("train.") and key.startswith(_FREE)}
    values = {key.removeprefix("train."): value for key, value in changed.items() if value != "auto"}
    return begun.model_copy(
        update={
            "train": begun.train.model_copy(update=values),
            "evaluate": loaded.recipe.evaluate,
            "output": loaded.recipe.output,
            "name": loaded.recipe.name,
        }
    )


def checkpoint_to_resume(run: Run, prepared: Prepared, progress: Progress) -> Path | None:
    """The newest checkpoint of the run; None when none was written yet.

    Raises:
        UserError: the run has ended, or its data, tokenizer or base model have changed.
    """
    if not run.manifest.is_file():
        progress.warn(f"{run.folder}: nothing to resume, starting from the beginning")
        return None
    manifest = run.read_manifest()
    if manifest.get("status") == "complete":
        raise UserError(f"{run.folder}: this run has ended; there is nothing to resume.")
    check_base(prepared.base, manifest, run.folder)
    changed = [path for path, sha in file_sha256s(prepared.recipe.data).items() if _recorded(manifest, path) != sha]
    if changed:
        raise UserError(
            f"{run.folder}: {', '.join(changed)} changed since this run was begun. Train into another folder."
        )
    if manifest.get("tokenizer_sha256") != tokenizer_sha256(prepared.tokenizer):
        raise UserError(f"{run.folder}: the tokenizer or its chat template changed since this run was begun.")
    checkpoints = run.complete_checkpoints()
    if not checkpoints:
        progress.warn(f"{run.folder}: has no checkpoint yet, starting from the beginning")
        return None
    progress.say(f"resuming after {checkpoints[-1].name}")
    return checkpoints[-1]


def _recorded(manifest: dict[str, Any], path: str) -> str | None:
    files = manifest.get("data", {}).get("files", {})
    return str(files[path]) if path in files else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix.count(".") < 1:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
