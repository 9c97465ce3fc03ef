"""Resuming: which checkpoint a run goes on from, and whether it is still the same run."""

import json
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from lorakit.data.examples import file_sha256s, tokenizer_sha256
from lorakit.errors import UserError
from lorakit.model.peft_adapter import TRAINED_DIR, TRAINED_WEIGHTS
from lorakit.plan.run_rows import changed_files, changed_tokens, changed_versions
from lorakit.prepare import Prepared, check_base, check_stop_tokens
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.load import LoadedRecipe, load
from lorakit.recipe.schema import Adapter, Recipe
from lorakit.run_dir import CLEARED, Run
from lorakit.train.setup import RANK_SCHEDULER, scheduler_factory

# What may differ when a run goes on: where it lies, what is kept of it, what follows it, and what never changes it.
_FREE = ("name", "output", "evaluate", "train.keep", "train.micro_batch", "train.gradient_checkpointing")


def require_started_run(run: Run) -> None:
    """Refuse to resume where no run was begun: it would start from nothing, in a place that may be a slip of the pen.

    Raises:
        UserError: it names the nearest run.
    """
    if run.recipe.is_file() or run.manifest.exists():  # another program's is told of where the folder is opened
        return
    folder = run.folder
    begun = (path.parent for path in folder.parent.glob("*/manifest.json"))
    near = nearest(folder.name, [path.name for path in begun if Run(path).holds_results()])
    remedy = f"Did you mean --output {folder.parent / near}?" if near else "Start one without --resume."
    raise UserError(f"{folder}: there is no run to resume. {remedy}")


def resumed_recipe(run: Run, loaded: LoadedRecipe) -> Recipe:
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
    values = {
        key.removeprefix("train."): value
        for key, value in changed.items()
        if value != "auto" and (_by_hand(key, loaded) or not _ran_out(key, value, run))
    }
    return begun.model_copy(
        update={
            "train": begun.train.model_copy(update=values),
            "evaluate": loaded.recipe.evaluate,
            "output": loaded.recipe.output,
            "name": loaded.recipe.name,
        }
    )


def _by_hand(key: str, loaded: LoadedRecipe) -> bool:
    """Whether a key was given with `--set`."""
    return key in loaded.places and bool(loaded.places[key].setting)


def _ran_out(key: str, value: Any, run: Run) -> bool:
    """Whether a value is one with which the run ran out of memory: it goes on with what fitted."""
    changes = run.read_manifest().get("out_of_memory", [])
    if key == "train.micro_batch":
        return any(value >= change["micro_batch"] for change in changes)
    if key == "train.gradient_checkpointing":
        return value is False and any(change["gradient_checkpointing"] for change in changes)
    return False


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
            f"{run.folder}: its results were deleted for a run that had not begun, starting from the beginning"
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
    recorded, found = manifest.get("data", {}).get("files", {}), file_sha256s(prepared.recipe.data)
    changed = changed_files(recorded, found)
    if changed:
        raise UserError(
            f"{run.folder}: {', '.join(changed)} changed since this run was begun. Train into another folder."
        )
    if manifest.get("tokenizer_sha256") != tokenizer_sha256(prepared.tokenizer):
        raise UserError(f"{run.folder}: the tokenizer or its chat template changed since this run was begun.")
    check_stop_tokens(prepared, manifest, run.folder)
    other = changed_tokens(prepared.tokens_sha256, manifest)
    if other:
        raise UserError(f"{run.folder}: {other}. Resume with what it was begun with, or train into another folder.")
    if other_versions := changed_versions(manifest):
        progress.warn(f"{run.folder}: begun with other versions, so the last digits may differ: {other_versions}")
    checkpoints, content = run.complete_checkpoints(), _content(prepared.recipe.adapter)
    for checkpoint in reversed(checkpoints):
        damage = _damage(checkpoint, content) or _damage_of_best(run, checkpoint, content)
        if damage is None:
            progress.say(f"resuming after {checkpoint.name}")
            return checkpoint
        progress.warn(f"{checkpoint}: damaged, and left aside: {damage}")
    if checkpoints:
        raise UserError(
            f"{run.folder}: every checkpoint is damaged. Start over with --overwrite, or in another folder."
        )
    progress.warn(f"{run.folder}: has no checkpoint yet, starting from the beginning")
    return None


def _damage(checkpoint: Path, content: dict[str, Callable[[Path], None]]) -> str | None:
    """Why a checkpoint cannot be resumed from; None when all that the next step depends on can be read."""
    for name, read in content.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            read(checkpoint / name)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            EOFError,
            SafetensorError,
            UnpicklingError,
        ) as error:
            return f"{name} cannot be read: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    return None


def _damage_of_best(run: Run, checkpoint: Path, content: dict[str, Callable[[Path], None]]) -> str | None:
    """Why the best checkpoint up to this one, whose weights may be the result, cannot be read; None when it can."""
    best = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).get("best_global_step")
    if not best or run.checkpoint(best) == checkpoint:
        return None
    weights = {name: content[name] for name in (TRAINED_WEIGHTS, RANK_SCHEDULER) if name in content}
    damage = _damage(run.checkpoint(best), weights)
    return f"the best one before it, {run.checkpoint(best).name}, is: {damage}" if damage else None


def _read_state(path: Path) -> None:
    if json.loads(path.read_text(encoding="utf-8"))["global_step"] != int(path.parent.name.removeprefix("step-")):
        raise ValueError("it is of another step")


def _read_weights(path: Path) -> None:
    with safe_open(path, "pt") as weights:
        weights.keys()


def _read_tensors(path: Path) -> None:
    with safe_globals():
        torch.load(path, map_location="cpu", weights_only=True)


def _read_config(path: Path) -> None:
    PeftConfig.from_pretrained(str(path.parent))


def _content(adapter: Adapter) -> dict[str, Callable[[Path], None]]:
    """The files of a checkpoint, each with the way to read it."""
    found: dict[str, Callable[[Path], None]] = {
        "trainer_state.json": _read_state,
        TRAINED_WEIGHTS: _read_weights,
        "optimizer.pt": _read_tensors,
        "scheduler.pt": _read_tensors,
        "rng_state.pth": _read_tensors,
    }
    if not trains_all(adapter):
        found[f"{TRAINED_DIR}/adapter_config.json"] = _read_config
    if scheduler_factory(adapter):
        found[RANK_SCHEDULER] = _read_weights
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix.count(".") < 1:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
