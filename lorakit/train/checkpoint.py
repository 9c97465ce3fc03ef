"""The model's part of a checkpoint: written, restored, and checked for damage."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_pt_utils import safe_globals

from lorakit.model.adapters import RankScheduler
from lorakit.model.adapters.plain_lora import full_config, save_adapter, save_config
from lorakit.model.peft_adapter import TRAINED_DIR, TRAINED_WEIGHTS, load_trained, trained_weights
from lorakit.recipe.adapter_kind import adapter_spec, initial_adapter, trains_all
from lorakit.recipe.schema import Adapter
from lorakit.run_dir import Run

RANK_SCHEDULER = f"{TRAINED_DIR}/driver.safetensors"
"""The file of a checkpoint that holds the state of the rank scheduler."""
_STATE = "trainer_state.json"
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


def has_rank_scheduler(adapter: Adapter) -> bool:
    """Whether ranks move during training: in some kinds, but not where an existing adapter is trained on."""
    return adapter_spec(adapter).callback is not None and not initial_adapter(adapter)


def save_model_state(model: Any, scheduler: RankScheduler | None, folder: Path) -> None:
    """Write the trained weights and the scheduler's state, and the adapter for whoever wants to try it as it was."""
    (folder / TRAINED_DIR).mkdir()
    save_file({name: tensor.contiguous() for name, tensor in trained_weights(model).items()}, folder / TRAINED_WEIGHTS)
    if hasattr(model, "peft_config"):
        save_config(full_config(model), folder / TRAINED_DIR)
        save_adapter(model, folder)
    if scheduler:
        save_file(scheduler.state(), folder / RANK_SCHEDULER)


def restore_model_state(model: Any, scheduler: RankScheduler | None, checkpoint: Path) -> None:
    """Put the model and its rank scheduler where they were at a checkpoint."""
    if scheduler:
        scheduler.restore(load_file(checkpoint / RANK_SCHEDULER), load_file(checkpoint / TRAINED_WEIGHTS))
    load_trained(model, checkpoint)


def find_damage(run: Run, checkpoint: Path, adapter: Adapter) -> str | None:
    """Why a run cannot be resumed from a checkpoint; None where all that the next step depends on can be read.

    The best checkpoint so far is checked too: the result may be its weights.
    """
    weights = [TRAINED_WEIGHTS, *([RANK_SCHEDULER] if has_rank_scheduler(adapter) else [])]
    config = [] if trains_all(adapter) else [f"{TRAINED_DIR}/adapter_config.json"]
    if damage := _unreadable(checkpoint, [_STATE, *weights, "optimizer.pt", "scheduler.pt", "rng_state.pth", *config]):
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
            return f"{name} cannot be read: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    return None


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
