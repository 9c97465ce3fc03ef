"""What is trained: the base in memory with its adapter, fresh, from another run, or from a checkpoint."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file

from lorakit.amounts import percent
from lorakit.data.batches import collate, run_batches
from lorakit.errors import UserError
from lorakit.model.adapters import InitContext, RankScheduler
from lorakit.model.load import (
    DTYPES,
    check_embeddings,
    load_model,
    original_weights,
    stored_dtype,
)
from lorakit.model.peft_adapter import (
    TRAINED_DIR,
    TRAINED_WEIGHTS,
    attach_adapter,
    continue_adapter,
    count_parameters,
    load_trained,
    rebuild_adapter,
)
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.quantized_model import describe_quantization, quantization_facts, summarize_quantization
from lorakit.model.spec_from_meta import spec_from_meta
from lorakit.model.spectrum import signal_to_noise_ratios
from lorakit.model.targets import Targets, select_targets, trains_every_weight
from lorakit.model.tokenizer import pad_token_id
from lorakit.plan.model_info import read_model_info
from lorakit.plan.trainable_params import count_parameters as count_planned
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import adapter_folder, adapter_spec, initial_adapter, kind_settings, trains_all
from lorakit.recipe.schema import Adapter, Model, Spectrum
from lorakit.run_dir import Run

RANK_SCHEDULER = f"{TRAINED_DIR}/driver.safetensors"
"""The file of a checkpoint that holds what the adapter's kind keeps from step to step."""


def planned_parameters(prepared: Prepared) -> tuple[int, int] | None:
    """Trainable and all parameters of a prepared recipe; None where the choice of modules needs the weights."""
    settings, folder = prepared.recipe.adapter, prepared.base.folder
    if isinstance(settings.layers, Spectrum) and not initial_adapter(settings):
        return None
    info = read_model_info(folder)
    return count_planned((info and info.spec) or spec_from_meta(folder), settings)


@dataclass(frozen=True)
class TrainingState:
    """A model ready to be trained."""

    model: Any
    rank_scheduler: RankScheduler | None
    config: Any
    """The model's configuration as it was loaded: the libraries change theirs for the training."""
    quantization: dict[str, Any]
    """What was asked for and what holds, as the manifest says it."""
    trainable: int
    total: int


def set_up_training(prepared: Prepared, checkpoint: Path | None, progress: Progress) -> TrainingState:
    """The model of a prepared recipe, with its adapter as the first step finds it, or the step after `checkpoint`.

    Raises:
        UserError: the recipe asks for modules that the model has not, or for an adapter that does not fit it.
    """
    recipe = prepared.recipe
    everything = trains_all(recipe.adapter)
    base = load_model(prepared.base, prepared.model, prepared.machine.device, trainable=everything)
    config = copy.deepcopy(base.config)
    held, stored = summarize_quantization(base), stored_quantization(prepared.base.folder)
    words = describe_quantization(held, recipe.model.quantization, stored, recipe.model.dtype)
    if words:
        progress.say(words)
    check_embeddings(base, prepared.base, prepared.largest_token)
    facts = quantization_facts(held, recipe.model.quantization, stored)
    model = _attached(base, prepared, facts["effective"], checkpoint, progress)
    model.eval()  # PEFT adds its dropout in training mode
    if not everything:
        adapter = model.peft_config["default"]
        adapter.base_model_name_or_path, adapter.revision = recipe.model.base, recipe.model.revision
    scheduler = _rank_scheduler(model, prepared)
    if checkpoint:
        restore(model, scheduler, checkpoint)
    if not everything:
        _say_what_is_attached(model, recipe.adapter, progress)
    trainable, total = count_parameters(model)
    progress.say(f"trainable parameters: {trainable:,} of {total:,} ({percent(trainable / total, 2)})")
    return TrainingState(model, scheduler, config, facts, trainable, total)


def _attached(base: Any, prepared: Prepared, held: str, checkpoint: Path | None, progress: Progress) -> Any:
    settings, seed = prepared.recipe.adapter, prepared.recipe.train.seed
    everything = trains_all(settings)
    if checkpoint and not everything:
        return rebuild_adapter(base, settings, None, checkpoint)
    source = initial_adapter(settings)
    if source:
        folder = adapter_folder(Path(source))
        _check_beginning(Path(source), prepared, held, progress)
        return continue_adapter(base, folder, settings.dropout)
    targets = _targets(base, prepared, progress)
    if checkpoint:
        return rebuild_adapter(base, settings, targets, checkpoint)
    if not (everything and trains_every_weight(settings)):
        for note in targets.notes:
            progress.say(note)
    return attach_adapter(base, settings, seed, targets, _init_context(prepared, progress))


def _check_beginning(source: Path, prepared: Prepared, held: str, progress: Progress) -> None:
    """Say where the adapter was trained on other weights than those it gets now."""
    manifest = _manifest_of(source)
    if manifest is None:
        return
    recorded, found = manifest["base"]["sha256"], prepared.base.sha256()
    if any(recorded.get(name) != found.get(name) for name in found if name.endswith(".safetensors")):
        progress.warn(
            f"adapter.from: {source} was trained on other weights, those of {manifest['base'].get('name')}; now it is "
            f"put on {prepared.base.name}"
        )
    trained_on = manifest["base"]["quantization"]
    if trained_on != held:
        progress.warn(
            f"adapter.from: {source} was trained on {_weights(trained_on)}; now it is put on {_weights(held)}"
        )


def _say_what_is_attached(model: Any, settings: Adapter, progress: Progress) -> None:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    if initial_adapter(settings):
        config = model.peft_config["default"]
        kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
        progress.say(f"adapter.from: a {kind} adapter of rank {config.r} on {len(layers)} modules is trained on")
    elif isinstance(settings.layers, Spectrum):
        progress.say(f"adapter.layers: spectrum chose {len(layers)} modules")
    sizes = [(layer.r["default"], layer.in_features, layer.out_features) for _, layer in layers if layer.in_features]
    tight = sum(rank > min(inner, outer) for rank, inner, outer in sizes)
    if tight:
        progress.warn(f"adapter.rank: {tight} modules have fewer rows or columns than their rank: the rest is wasted")


def _manifest_of(source: Path) -> dict[str, Any] | None:
    """The manifest of the run that a folder is, or is the adapter or a checkpoint of; None where there is no run."""
    for folder in (source, source.parent, source.parent.parent):
        if Run(folder).manifest.is_file():
            try:
                return Run(folder).read_manifest()
            except UserError:  # a file of this name that is somebody else's
                continue
    return None


def _weights(quantization: str) -> str:
    return "unquantized weights" if quantization == "none" else f"{quantization} weights"


def _targets(base: Any, prepared: Prepared, progress: Progress) -> Targets:
    settings = prepared.recipe.adapter

    def signal(modules: list[str]) -> dict[str, float]:
        return signal_to_noise_ratios(base, modules, prepared.base, _held_in(prepared.model), progress)

    return select_targets(base, settings, signal)


def _held_in(model: Model) -> str:
    double = model.double_quant and model.quantization in ("q4", "nf4")
    return f"{model.quantization}{' double' if double else ''} {model.dtype}"


def _init_context(prepared: Prepared, progress: Progress) -> InitContext:
    recipe, rows = prepared.recipe, prepared.train.rows
    pad, lengths = pad_token_id(prepared.tokenizer), prepared.train.lengths().tolist()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        mixture, size = prepared.train.mixture, recipe.train.batch_size
        order = run_batches(lengths, size, recipe.train.seed, mixture)
        for indices in islice(order, max(1, mixture.steps_in(0, size))):
            yield collate([rows[index] for index in indices], pad)

    def originals(modules: list[str]) -> dict[str, torch.Tensor]:
        return original_weights(prepared.base, modules, DTYPES[stored_dtype(prepared.base)])

    return InitContext(batches, originals, progress)


def scheduler_factory(settings: Adapter) -> Callable[..., RankScheduler] | None:
    """What makes the rank scheduler of a recipe's kind; None where it has none, or an adapter is trained on."""
    drive: Callable[..., RankScheduler] | None = adapter_spec(settings).callback
    return None if initial_adapter(settings) else drive


def _rank_scheduler(model: Any, prepared: Prepared) -> RankScheduler | None:
    drive = scheduler_factory(prepared.recipe.adapter)
    return drive(model, kind_settings(prepared.recipe.adapter), prepared.steps) if drive else None


def restore(model: Any, scheduler: RankScheduler | None, checkpoint: Path) -> None:
    """Put the model and its rank scheduler where they were at a checkpoint."""
    if scheduler:
        scheduler.restore(load_file(checkpoint / RANK_SCHEDULER), load_file(checkpoint / TRAINED_WEIGHTS))
    load_trained(model, checkpoint)
