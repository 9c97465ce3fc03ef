"""Resuming: which checkpoint a run goes on from, and whether it is still the same run."""

from pathlib import Path
from typing import Any

from lorakit.data.examples import file_sha256s, tokenizer_sha256
from lorakit.errors import UserError
from lorakit.plan.run_rows import changed_files, changed_tokens, changed_versions
from lorakit.prepare import Prepared, check_base, check_stop_tokens
from lorakit.progress import Progress
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.load import LoadedRecipe, load
from lorakit.recipe.schema import Recipe
from lorakit.run_dir import CLEARED, Run
from lorakit.train.checkpoint import find_damage

# What may differ when a run goes on: it changes where results go and how fast they come, never the weights.
_FREE = ("name", "output", "evaluate", "train.keep", "train.micro_batch", "train.gradient_checkpointing")


def require_started_run(run: Run) -> None:
    """Refuse to resume where no run was started: a new one would begin in a place that may be a typing error.

    Raises:
        UserError: it names the nearest run.
    """
    if run.recipe.is_file() or run.manifest.exists():  # another program's is refused where the folder is opened
        return
    folder = run.folder
    runs = [path.parent for path in folder.parent.glob("*/manifest.json") if Run(path.parent).holds_results()]
    near = nearest(folder.name, [path.name for path in runs])
    remedy = f"Did you mean --output {folder.parent / near}?" if near else "Start one without --resume."
    raise UserError(f"{folder}: there is no run to resume. {remedy}")


def resumed_recipe(run: Run, loaded: LoadedRecipe) -> Recipe:
    """The recipe of the started run, with every `auto` as it was settled then.

    Raises:
        UserError: the recipe given now says something else.
    """
    if not run.recipe.is_file():
        return loaded.recipe
    recipe = load(run.recipe).recipe
    now, then = _flat(loaded.recipe.model_dump()), _flat(recipe.model_dump())
    differing = [
        f"  - {key}: {then.get(key)} then, {value} now ({loaded.where(key)})"
        for key, value in now.items()
        if value != "auto" and then.get(key) != value and not key.startswith(_FREE)
    ]
    if differing:
        lines = "\n".join(differing)
        raise UserError(
            f"{run.folder}: this run was started with another recipe:\n{lines}\nResume with that recipe "
            f"({run.recipe}), or train into another folder with --output."
        )
    given_with_set = [key for key, place in loaded.places.items() if place.setting]
    changeable = {key: value for key, value in now.items() if key.startswith("train.") and key.startswith(_FREE)}
    values = {
        key.removeprefix("train."): value
        for key, value in changeable.items()
        if value != "auto" and (key in given_with_set or not _ran_out_of_memory(key, value, run))
    }
    new = loaded.recipe
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=values),
            "evaluate": new.evaluate,
            "output": new.output,
            "name": new.name,
        }
    )


def _ran_out_of_memory(key: str, value: Any, run: Run) -> bool:
    """Whether the run ran out of memory with this value: it goes on with what fitted."""
    changes = run.read_manifest().get("out_of_memory", [])
    if key == "train.micro_batch":
        return any(value >= change["micro_batch"] for change in changes)
    if key == "train.gradient_checkpointing":
        return value is False and any(change["gradient_checkpointing"] for change in changes)
    return False


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Sections and what they hold, by dotted name; a mapping in a section is one value."""
    flat: dict[str, Any] = {}
    for section, value in values.items():
        is_section = isinstance(value, dict) and bool(value)
        flat |= {f"{section}.{name}": part for name, part in value.items()} if is_section else {section: value}
    return flat


def checkpoint_to_resume(run: Run, prepared: Prepared, progress: Progress) -> Path | None:
    """The newest checkpoint of the run; None when none was written yet.

    Raises:
        UserError: the run has ended, or its data, tokenizer or base model have changed.
    """
    if not run.manifest.is_file():
        progress.warn(f"{run.folder}: nothing to resume, starting from the beginning")
        return None
    manifest = run.read_manifest()
    if manifest.get("status") == CLEARED:
        progress.warn(
            f"{run.folder}: its results were deleted for a run that did not start, starting from the beginning"
        )
        return None
    if run.is_complete():
        raise UserError(f"{run.folder}: this run has ended; there is nothing to resume.")
    check_base(prepared.base, manifest, run.folder)
    if manifest.get("out_of_memory"):
        train = prepared.recipe.train
        progress.say(
            f"this run ran out of memory before: train.micro_batch is {train.micro_batch}, gradient_checkpointing "
            f"{str(train.gradient_checkpointing).lower()} (--set changes them; the result does not depend on them)"
        )
    _refuse_changes(run, prepared, manifest)
    if other_versions := changed_versions(manifest):
        progress.warn(f"{run.folder}: started with other versions, so the last digits may differ: {other_versions}")
    checkpoints = run.complete_checkpoints()
    for checkpoint in reversed(checkpoints):
        damage = find_damage(run, checkpoint, prepared.recipe.adapter)
        if damage is None:
            progress.say(f"resuming after {checkpoint.name}")
            return checkpoint
        progress.warn(f"{checkpoint}: damaged, so an older one is tried: {damage}")
    if checkpoints:
        raise UserError(
            f"{run.folder}: every checkpoint is damaged. Start over with --overwrite, or in another folder."
        )
    progress.warn(f"{run.folder}: has no checkpoint yet, starting from the beginning")
    return None


def _refuse_changes(run: Run, prepared: Prepared, manifest: dict[str, Any]) -> None:
    """Refuse data or a tokenizer that are not those that the run was begun with."""
    changed = changed_files(manifest.get("data", {}).get("files", {}), file_sha256s(prepared.recipe.data))
    if changed:
        raise UserError(
            f"{run.folder}: {', '.join(changed)} changed since this run was started. Train into another folder."
        )
    if manifest.get("tokenizer_sha256") != tokenizer_sha256(prepared.tokenizer):
        raise UserError(f"{run.folder}: the tokenizer or its chat template changed since this run was started.")
    check_stop_tokens(prepared, manifest, run.folder)
    if other := changed_tokens(prepared.tokens_sha256, manifest):
        raise UserError(f"{run.folder}: {other}. Resume with what it was started with, or train into another folder.")
