"""The model to train: the base in memory with its adapter, fresh, from another run, or from a checkpoint."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from lorakit.amounts import percent
from lorakit.data.batches import collate, run_batches
from lorakit.distributed.processes import together
from lorakit.errors import UserError
from lorakit.model import load
from lorakit.model.adapters import InitContext, RankScheduler
from lorakit.model.adapters.weight_init import signal_to_noise_ratios
from lorakit.model.attention import VARLEN, use_varlen
from lorakit.model.fused_lora import describe_unfused
from lorakit.model.loss import causal_of
from lorakit.model.peft_adapter import attach_adapter, continue_adapter, count_parameters, rebuild_adapter
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.resolve import Base
from lorakit.model.spec_from_meta import spec_from_meta
from lorakit.model.targets import select_targets, trains_every_weight
from lorakit.model.tokenizer import load_tokenizer, pad_token_id
from lorakit.plan.model_info import read_model_info
from lorakit.plan.trainable_params import count_parameters as count_planned
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.adapter_kind import adapter_folder, adapter_spec, initial_adapter, kind_settings, trains_all
from lorakit.recipe.schema import Adapter, Model, Spectrum
from lorakit.run_dir import Run
from lorakit.train.checkpoint import has_rank_scheduler, restore_model_state
from lorakit.train.sharding import Pass, Sharding, sharding_of

LoadBase = Callable[[Base, Model, str, bool], Any]
"""What loads a base by a recipe's section `model` on a device, to be trained whole or not."""


def planned_parameters(prepared: Prepared) -> tuple[int, int] | None:
    """Trainable and all parameters of a prepared recipe; None where the choice of modules needs the weights."""
    settings, folder = prepared.recipe.adapter, prepared.base.folder
    if isinstance(settings.layers, Spectrum) and not initial_adapter(settings):
        return None
    info = read_model_info(folder)
    return count_planned((info and info.spec) or spec_from_meta(folder), settings, len(prepared.base.new_rows))


@dataclass(frozen=True)
class TrainingState:
    """A model ready to be trained. `config` is its configuration as it was loaded: the libraries change theirs for the
    training. `quantization`: requested and effective, as in the manifest. `run`: what every pass over the model goes
    through."""

    model: Any
    rank_scheduler: RankScheduler | None
    sharding: Sharding
    run: Pass
    config: Any
    quantization: dict[str, Any]
    trainable: int
    total: int


def set_up_training(
    prepared: Prepared, checkpoint: Path | None, progress: Progress, load_base: LoadBase | None = None
) -> TrainingState:
    """The model of a prepared recipe, with its adapter as the first step finds it, or the step after `checkpoint`; all
    processes call it. `load_base`: takes the place of `load_model` for a base that is held whole. UserError where the
    recipe asks for modules that the model lacks, or for an adapter that does not fit it."""
    adapter, sharding = prepared.recipe.adapter, sharding_of(prepared.recipe.train)
    model, config, quantization = together(partial(_load, prepared, checkpoint, sharding, progress, load_base))
    trainable, total = count_parameters(model)
    run = sharding.attempt(partial(sharding.shard, model, torch.device(prepared.machine.device)))
    make_scheduler = adapter_spec(adapter).callback if has_rank_scheduler(adapter) else None
    scheduler = make_scheduler(model, kind_settings(adapter), prepared.steps) if make_scheduler else None
    if checkpoint:
        together(partial(restore_model_state, model, scheduler, checkpoint, sharding))
    progress.say(f"trainable parameters: {trainable:,} of {total:,} ({percent(trainable / total, 2)})")
    if prepared.recipe.train.optimizer.startswith("paged") and not prepared.machine.is_gpu:
        progress.say(
            f"train.optimizer: {prepared.recipe.train.optimizer}: without a GPU its states stay in main memory"
        )
    return TrainingState(model, scheduler, sharding, run, config, quantization, trainable, total)


def _load(
    prepared: Prepared, checkpoint: Path | None, sharding: Sharding, progress: Progress, load_base: LoadBase | None
) -> tuple[Any, Any, Any]:
    """The model with its adapter, its configuration as it was loaded, and its quantization."""
    recipe, adapter = prepared.recipe, prepared.recipe.adapter
    device = sharding.loading_device(prepared.machine.device)
    read = load_base if load_base and sharding == Sharding() else load.load_model
    base = read(prepared.base, prepared.model, device, trains_all(adapter))
    config = copy.deepcopy(base.config)
    precisions, stored = load.summarize_quantization(base), stored_quantization(prepared.base.folder)
    if words := load.describe_quantization(precisions, recipe.model.quantization, stored, recipe.model.dtype):
        progress.say(words)
    largest = max(examples.largest_token() for examples in (prepared.train, prepared.held_out) if examples)
    load.check_embeddings(base, prepared.base, largest)
    quantization = load.quantization_facts(precisions, recipe.model.quantization, stored)
    model = _attach(base, prepared, quantization["effective"], checkpoint, progress)
    model.eval()  # PEFT adds its dropout in training mode
    if recipe.model.attention == VARLEN:
        use_varlen(causal_of(model))
    if not trains_all(adapter):
        peft_config = model.peft_config["default"]
        peft_config.base_model_name_or_path, peft_config.revision = recipe.model.base, recipe.model.revision
        _report_adapter(model, adapter, progress)
    return model, config, quantization


def _attach(base: Any, prepared: Prepared, quantization: str, checkpoint: Path | None, progress: Progress) -> Any:
    """The base with its adapter; `quantization` is the one in effect."""
    adapter, model = prepared.recipe.adapter, prepared.model
    if checkpoint and not trains_all(adapter):
        return rebuild_adapter(base, adapter, None, checkpoint)
    if source := initial_adapter(adapter):
        _warn_of_other_weights(Path(source), prepared, quantization, progress)
        _refuse_other_tokens(adapter_folder(Path(source)), prepared)
        return continue_adapter(base, adapter_folder(Path(source)), adapter.dropout, prepared.base.new_rows)
    double = " double" if model.double_quant and model.quantization in ("q4", "nf4") else ""
    precision = f"{model.quantization}{double} {model.dtype}"

    def measure(modules: list[str]) -> dict[str, float]:
        return signal_to_noise_ratios(base, modules, prepared.base, precision, progress)

    targets = select_targets(base, adapter, measure, prepared.base.new_rows)
    if checkpoint:
        return rebuild_adapter(base, adapter, targets, checkpoint)
    if not (trains_all(adapter) and trains_every_weight(adapter)):
        for note in targets.notes:
            progress.say(note)
    return attach_adapter(base, adapter, prepared.recipe.train.seed, targets, _init_context(prepared, progress))


def _refuse_other_tokens(source: Path, prepared: Prepared) -> None:
    """Refuse to train an adapter's rows of new tokens on as those of other tokens."""
    rows = list(prepared.base.new_rows)
    if not rows or not (source / "tokenizer_config.json").is_file():
        return
    trained = load_tokenizer(Base(str(source), source, ""), None).convert_ids_to_tokens(rows)
    for row, before, now in zip(rows, trained, prepared.tokenizer.convert_ids_to_tokens(rows), strict=True):
        if before not in (None, now):
            reason = f"{source} trained row {row} of the embeddings as {before!r}, which is {now!r} here"
            raise UserError(f"adapter.from: {reason}. Write model.add_tokens as the recipe of that training has it.")


def _warn_of_other_weights(source: Path, prepared: Prepared, quantization: str, progress: Progress) -> None:
    """Warn where the adapter of a run was trained on other weights than those it gets now."""
    folders = (source, source.parent, source.parent.parent)  # the run, its adapter or one of its checkpoints
    run = next((run for run in map(Run, folders) if run.holds_results()), None)
    if run is None:
        return
    before, now = run.read_manifest()["base"], prepared.base.sha256()
    if any(before["sha256"].get(name) != now.get(name) for name in now if name.endswith(".safetensors")):
        progress.warn(
            f"adapter.from: {source} was trained on other weights, those of {before.get('name')}; now it is attached "
            f"to {prepared.base.name}"
        )
    if before["quantization"] != quantization:
        one, other = ("unquantized" if word == "none" else word for word in (before["quantization"], quantization))
        progress.warn(f"adapter.from: {source} was trained on {one} weights; now it is attached to {other} weights")


def _report_adapter(model: Any, settings: Adapter, progress: Progress) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if initial_adapter(settings):
        config = model.peft_config["default"]
        kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
        progress.say(f"adapter.from: a {kind} adapter of rank {config.r} on {len(layers)} modules is trained further")
    elif isinstance(settings.layers, Spectrum):
        progress.say(f"adapter.layers: spectrum chose {len(layers)} modules")
    sizes = [(layer.r["default"], layer.in_features, layer.out_features) for layer in layers if layer.in_features]
    if tight := sum(rank > min(inner, outer) for rank, inner, outer in sizes):
        progress.warn(f"adapter.rank: {tight} modules have fewer rows or columns than their rank: the rest is wasted")
    if unfused := describe_unfused(model):
        progress.say(unfused)


def _init_context(prepared: Prepared, progress: Progress) -> InitContext:
    """What the initialization of some kinds asks for."""
    train, settings = prepared.train, prepared.recipe.train

    def first_epoch() -> Iterator[dict[str, torch.Tensor]]:
        lengths = train.lengths().tolist()
        order = run_batches(lengths, settings.batch_size, settings.seed, train.mixture)
        for indices in islice(order, max(1, train.mixture.steps_in(0, settings.batch_size))):
            yield collate([train.rows[index] for index in indices], pad_token_id(prepared.tokenizer))

    def originals(modules: list[str]) -> dict[str, torch.Tensor]:
        return load.original_weights(prepared.base, modules, load.DTYPES[load.stored_dtype(prepared.base)])

    return InitContext(first_epoch, originals, progress)
