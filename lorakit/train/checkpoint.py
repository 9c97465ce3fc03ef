"""Checkpoints: the model's part of one, written and restored; and which one a run goes on from, if it is still the same
run."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_pt_utils import safe_globals

from lorakit.data.examples import file_sha256s
from lorakit.errors import UserError, first_line
from lorakit.hardware.accelerator import random_states, set_random_states
from lorakit.model.adapters import RankScheduler
from lorakit.model.peft_adapter import (
    TRAINED_DIR,
    TRAINED_WEIGHTS,
    full_config,
    load_trained,
    save_adapter,
    save_config,
)
from lorakit.prepare import Prepared, refuse_other_base
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import adapter_spec, initial_adapter, trains_all
from lorakit.recipe.load import LoadedRecipe, load
from lorakit.recipe.schema import Adapter, Recipe
from lorakit.run_dir import CLEARED, Run
from lorakit.run_inputs import changed_files, changed_tokens, changed_versions
from lorakit.train.sharding import Sharding

RANK_SCHEDULER = f"{TRAINED_DIR}/driver.safetensors"  # the state of the rank scheduler in a checkpoint
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names
_STATE = "trainer_state.json"
# The generator of a device that transformers does not save: it saves the processor's and CUDA's.
_DEVICE_GENERATOR, _SAVED_BY_TRAINER = "device_rng_state.pth", ("cpu", "cuda")
# What may differ when a run goes on: it changes where results go and how fast they come, never the weights.
_SPEED = ("micro_batch", "gradient_checkpointing", "kernels", "compile", "sharding")
_FREE = ("name", "output", "evaluate", "track", "train.keep", *(f"train.{name}" for name in _SPEED))
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


def has_rank_scheduler(adapter: Adapter) -> bool:
    """Whether ranks move during training: in some kinds, but not where an existing adapter is trained on."""
    return adapter_spec(adapter).callback is not None and not initial_adapter(adapter)


def save_model_state(
    model: Any, weights: dict[str, torch.Tensor], scheduler: RankScheduler | None, folder: Path
) -> None:
    """Write the whole trained `weights` and the scheduler's state, and the adapter for whoever wants to try it as it
    was."""
    (folder / TRAINED_DIR).mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / TRAINED_WEIGHTS)
    if hasattr(model, "peft_config"):
        save_config(full_config(model), folder / TRAINED_DIR)
        save_adapter(model, folder)
    if scheduler:
        save_file(scheduler.state(), folder / RANK_SCHEDULER)


def restore_model_state(model: Any, scheduler: RankScheduler | None, checkpoint: Path, sharding: Sharding) -> None:
    """Put the model and its rank scheduler where they were at a checkpoint."""
    if scheduler:
        scheduler.restore(load_file(checkpoint / RANK_SCHEDULER), load_file(checkpoint / TRAINED_WEIGHTS))
    load_trained(model, checkpoint, sharding.put)


def resumed_recipe(run: Run, loaded: LoadedRecipe) -> Recipe:
    """The recipe of the started run, with every `auto` as it was settled then; UserError where the recipe given now
    says something else."""
    if not run.recipe.is_file():
        return loaded.recipe
    recipe = load(run.recipe).recipe
    now, then = _flat(loaded.recipe.model_dump()), _flat(recipe.model_dump())
    differing = [
        f"  - {key}: {_as_json(then.get(key))} then, {_as_json(value)} now ({loaded.where(key)})"
        for key, value in now.items()
        if value != "auto" and then.get(key) != value and not key.startswith(_FREE)
    ]
    if differing:
        lines = "\n".join(differing)
        raise UserError(
            f"{run.folder}: this run was started with another recipe:\n{lines}\nResume with that recipe "
            f"({run.recipe}), or train into another folder with --output."
        )
    values = {}
    for name in ("keep", *_SPEED):
        value, place = now[f"train.{name}"], loaded.places.get(f"train.{name}")
        if value != "auto" and ((place and place.setting) or not _ran_out_of_memory(name, value, run)):
            values[name] = value
    others = {name: getattr(loaded.recipe, name) for name in ("name", "output", "evaluate", "track")}
    return recipe.model_copy(update={**others, "train": recipe.train.model_copy(update=values)})


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _ran_out_of_memory(name: str, value: Any, run: Run) -> bool:
    """Whether the run ran out of memory with this value: it goes on with what fitted."""
    changes = run.read_manifest().get("out_of_memory", [])
    if name == "micro_batch":
        return any(value >= change["micro_batch"] for change in changes)
    recomputed = any(change["gradient_checkpointing"] for change in changes)
    return name == "gradient_checkpointing" and value is False and recomputed


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Sections and what they hold, by dotted name; a mapping in a section is one value."""
    flat: dict[str, Any] = {}
    for section, value in values.items():
        is_section = isinstance(value, dict) and bool(value)
        flat |= {f"{section}.{name}": part for name, part in value.items()} if is_section else {section: value}
    return flat


def checkpoint_to_resume(run: Run, prepared: Prepared, progress: Progress) -> Path | None:
    """The newest checkpoint of the run; None when none was written yet. UserError where the run has ended, or its data,
    tokenizer or base model have changed."""
    manifest = run.read_manifest() if run.manifest.is_file() else {}
    if manifest.get("status", CLEARED) == CLEARED:  # for a run that did not start
        progress.warn(f"{run.folder}: has no results, starting from the beginning")
        return None
    if run.is_complete():
        raise UserError(f"{run.folder}: this run has ended; there is nothing to resume.")
    refuse_other_base(prepared, manifest, run.folder)
    if manifest.get("out_of_memory"):
        train = prepared.recipe.train
        progress.say(
            f"this run ran out of memory before: train.micro_batch is {train.micro_batch}, gradient_checkpointing "
            f"{str(train.gradient_checkpointing).lower()} (--set changes them; the result does not depend on them)"
        )
    changed = changed_files(manifest["data"]["files"], file_sha256s(prepared.recipe.data))
    changes = f"{', '.join(changed)} changed since this run was started" if changed else ""
    if changes := changes or changed_tokens(prepared.tokens_sha256, manifest):
        raise UserError(f"{run.folder}: {changes}. Resume with what it was started with, or train into another folder.")
    if other_versions := changed_versions(manifest):
        progress.warn(f"{run.folder}: started with other versions, so the last digits may differ: {other_versions}")
    for checkpoint in reversed(run.complete_checkpoints()):
        damage = _find_damage(run, checkpoint, prepared.recipe.adapter)
        if damage is None:
            progress.say(f"resuming after {checkpoint.name}")
            return checkpoint
        progress.warn(f"{checkpoint}: damaged, so an older one is tried: {damage}")
    if run.complete_checkpoints():
        raise UserError(f"{run.folder}: every checkpoint is damaged. Start over with --overwrite or another --output.")
    progress.warn(f"{run.folder}: has no checkpoint yet, starting from the beginning")
    return None


def _find_damage(run: Run, checkpoint: Path, adapter: Adapter) -> str | None:
    """Why a run cannot be resumed from a checkpoint; None where all that the next step depends on can be read, of the
    best checkpoint so far too: the result may be its weights."""
    weights = [TRAINED_WEIGHTS, *([RANK_SCHEDULER] if has_rank_scheduler(adapter) else [])]
    config = [] if trains_all(adapter) else [f"{TRAINED_DIR}/adapter_config.json"]
    if damage := _unreadable(checkpoint, [_STATE, *weights, OPTIMIZER, SCHEDULER, "rng_state.pth", *config]):
        return damage
    best_step = json.loads((checkpoint / _STATE).read_text(encoding="utf-8")).get("best_global_step")
    best = run.checkpoint(best_step) if best_step else checkpoint
    if best != checkpoint and (damage := _unreadable(best, weights)):
        return f"the best one before it, {best.name}, is: {damage}"
    return None


def _unreadable(checkpoint: Path, names: list[str]) -> str | None:
    for name in names:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            _read(checkpoint / name, int(checkpoint.name.removeprefix("step-")))
        except _READ_ERRORS as error:
            return f"{name} cannot be read: {first_line(error)}"
    return None


def save_device_generator(device: torch.device, folder: Path) -> None:
    """Write the state of a device's generator where the trainer does not."""
    if device.type not in _SAVED_BY_TRAINER:
        torch.save(random_states(device)[-1], folder / _DEVICE_GENERATOR)


def restore_device_generator(device: torch.device, checkpoint: Path) -> None:
    """Put that state back; a run that goes on on another type of device draws from a fresh one."""
    if device.type not in _SAVED_BY_TRAINER and (checkpoint / _DEVICE_GENERATOR).is_file():
        state = torch.load(checkpoint / _DEVICE_GENERATOR, map_location="cpu", weights_only=True)
        set_random_states(device, [torch.get_rng_state(), state])


def _read(path: Path, step: int) -> None:
    """Read a file as training would; the library raises one of `_READ_ERRORS` where it is damaged."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as weights:
            weights.keys()
    elif path.suffix in (".pt", ".pth"):
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True)
    elif path.name == _STATE:
        if json.loads(path.read_text(encoding="utf-8"))["global_step"] != step:
            raise ValueError("it is of another step")
    else:
        PeftConfig.from_pretrained(str(path.parent))
