"""What is trained: the base in memory with its adapter, fresh, from another run, or from a checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorakit.data.batches import collate, epoch_batches
from lorakit.model.adapters.driver import Driver, Given
from lorakit.model.attach import (
    STATE,
    WEIGHTS,
    attach_adapter,
    chooses_everything,
    continue_adapter,
    load_trained,
    parameter_counts,
    reattach,
)
from lorakit.model.load import DTYPES, check_vocabulary, load_model, original_weights, pad_token_id, stored_dtype
from lorakit.model.quantized import quantization_facts, quantization_of, quantization_words
from lorakit.model.spectrum import signals
from lorakit.model.stored import stored_quantization
from lorakit.model.targets import Targets, select_targets
from lorakit.plan.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.kinds import adapter_folder, begins_from, kind_of, kind_settings, trains_all
from lorakit.recipe.schema import Adapter
from lorakit.runs import Run

DRIVER = f"{STATE}/driver.safetensors"
"""The file of a checkpoint that holds what the adapter's kind keeps from step to step."""


@dataclass(frozen=True)
class Begun:
    """A model ready to be trained."""

    model: Any
    driver: Driver | None
    quantization: dict[str, Any]
    """What was asked for and what holds, as the manifest says it."""
    trainable: int
    total: int


def begin(prepared: Prepared, checkpoint: Path | None, progress: Progress) -> Begun:
    """The model of a prepared recipe, with its adapter as the first step finds it, or the step after `checkpoint`.

    Raises:
        UserError: the recipe asks for modules that the model has not, or for an adapter that does not fit it.
    """
    recipe = prepared.recipe
    everything = trains_all(recipe.adapter)
    base = load_model(prepared.base, prepared.model, prepared.machine.device, trainable=everything)
    held, stored = quantization_of(base), stored_quantization(prepared.base.folder)
    words = quantization_words(held, recipe.model.quantization, stored, recipe.model.dtype)
    if words:
        progress.say(words)
    check_vocabulary(base, prepared.largest_token, prepared.base.name)
    facts = quantization_facts(held, recipe.model.quantization, stored)
    model = _attached(base, prepared, facts["effective"], checkpoint, progress)
    model.eval()  # PEFT adds its dropout in training mode
    if not everything:
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.revision = recipe.model.base, recipe.model.revision
    driver = _driver(model, prepared)
    if checkpoint:
        take_up(model, driver, checkpoint)
    trainable, total = parameter_counts(model)
    progress.say(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    return Begun(model, driver, facts, trainable, total)


def _attached(base: Any, prepared: Prepared, held: str, checkpoint: Path | None, progress: Progress) -> Any:
    settings, seed = prepared.recipe.adapter, prepared.recipe.train.seed
    everything = trains_all(settings)
    if checkpoint and not everything:
        return reattach(base, settings, None, checkpoint)
    source = begins_from(settings)
    if source:
        folder = adapter_folder(Path(source))
        _check_beginning(Path(source), prepared, held, progress)
        return continue_adapter(base, folder, settings.dropout)
    targets = _targets(base, prepared, progress)
    if checkpoint:
        return reattach(base, settings, targets, checkpoint)
    if not (everything and chooses_everything(settings)):
        for note in targets.notes:
            progress.say(note)
    return attach_adapter(base, settings, seed, targets, _given(prepared, progress))


def _check_beginning(source: Path, prepared: Prepared, held: str, progress: Progress) -> None:
    """Say where the adapter was trained on other weights than those it gets now."""
    folders = (source, source.parent, source.parent.parent)  # a run, its adapter, or one of its checkpoints
    run = next((Run(folder) for folder in folders if Run(folder).manifest.is_file()), None)
    if run is None:
        return
    manifest = run.read_manifest()
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


def _weights(quantization: str) -> str:
    return "unquantized weights" if quantization == "none" else f"{quantization} weights"


def _targets(base: Any, prepared: Prepared, progress: Progress) -> Targets:
    settings = prepared.recipe.adapter

    def signal(modules: list[str]) -> dict[str, float]:
        return signals(base, modules, prepared.base, prepared.model.quantization, progress)

    return select_targets(base, settings, bool(kind_of(settings).facts.get("experts")), signal)


def _given(prepared: Prepared, progress: Progress) -> Given:
    recipe, rows = prepared.recipe, prepared.train.rows
    pad, lengths = pad_token_id(prepared.tokenizer), prepared.train.lengths().tolist()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        order = epoch_batches(lengths, recipe.train.batch_size, recipe.train.seed, 0, prepared.train.weights)
        for indices in order:
            yield collate([rows[index] for index in indices], pad)

    def originals(modules: list[str]) -> dict[str, torch.Tensor]:
        return original_weights(prepared.base, modules, DTYPES[stored_dtype(prepared.base)])

    return Given(batches, originals, progress)


def driven_by(settings: Adapter) -> Callable[..., Driver] | None:
    """What makes the driver of a recipe's kind; None where the kind has none, or an adapter is trained on."""
    drive: Callable[..., Driver] | None = kind_of(settings).facts.get("drive")
    return None if begins_from(settings) else drive


def _driver(model: Any, prepared: Prepared) -> Driver | None:
    drive = driven_by(prepared.recipe.adapter)
    return drive(model, kind_settings(prepared.recipe.adapter), prepared.steps) if drive else None


def take_up(model: Any, driver: Driver | None, checkpoint: Path) -> None:
    """Put the model and its driver where they were at a checkpoint."""
    if driver:
        driver.restore(load_file(checkpoint / DRIVER), load_file(checkpoint / WEIGHTS))
    load_trained(model, checkpoint)
