"""The base model's own files, before they are loaded and without torch: what a run would refuse, and what their
quantization means."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lorakit.errors import UserError
from lorakit.hardware.machine import Machine
from lorakit.model.base_files import check_base_files, refuse_missing_tokenizer
from lorakit.model.quantization_config import describe_savings, missing_packages, refuse_irreversible
from lorakit.plan.memory import DTYPE_BYTES, weight_bytes
from lorakit.plan.model_info import ModelInfo, hub_snapshot
from lorakit.recipe.schema import Model, Recipe


def check_local_base(recipe: Recipe, complete: bool = True) -> None:
    """Refuse a base model whose files a run would refuse, where they are here.

    Args:
        complete: whether a file that a folder lacks is a fault.

    Raises:
        UserError: a file is missing, damaged or pickled, code is to be run, or the template reads no such variable.
    """
    model, path = recipe.model, Path(recipe.model.base)
    local = path if path.is_absolute() and path.is_dir() else None
    folder = local or (None if path.is_absolute() else hub_snapshot(model.base, model.revision))
    if model.template_variables or model.template_date != "auto":
        _check_template(model, folder)
    if folder:
        check_base_files(folder, complete and folder == local)
    if local and complete:
        refuse_missing_tokenizer(local)
    if path.is_absolute() and not local:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if not is_gguf:
            raise UserError(
                f"model.base: {path}: no readable GGUF file: it does not begin as one does. Fetch it again."
            )
        if not find_spec("gguf"):
            raise UserError(f"model.base: {path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.")


def _check_template(model: Model, folder: Path | None) -> None:
    """Refuse a variable or a day that the chat template here does not read."""
    from lorakit.data.template_source import (  # 70 ms of imports
        check_template_date,
        check_template_variables,
        read_templates,
        writes_date,
    )

    own = Path(model.chat_template) if model.chat_template else None
    if model.template_variables:
        check_template_variables(folder, own, model.template_variables)
    if model.template_date != "auto" and (templates := read_templates(folder, own)):
        check_template_date(model.template_date, writes_date(templates))


def describe_missing_files(recipe: Recipe) -> str | None:
    """What of the base's files a run would miss, of a base that `check_local_base` takes; None where nothing is."""
    try:
        check_local_base(recipe)
    except UserError as error:
        return f"{error} It is planned all the same; a run would be refused"
    return None


def refuse_unmergeable(recipe: Recipe, info: ModelInfo) -> None:
    """Refuse a recipe that asks for a merged model of weights to which nothing can be added.

    Raises:
        UserError: the quantization of the base's own weights cannot be undone.
    """
    if recipe.output.merged:
        refuse_irreversible(info.stored, recipe.model.base)


@dataclass(frozen=True)
class Checkpoint:
    """The quantization that the weights have on disk, and what follows from it."""

    quantization: str
    treatment: str  # kept: trained on as stored; dequantized: turned into plain weights while they are loaded
    mergeable: bool  # whether an adapter can be added to them
    missing: tuple[str, ...]  # packages that load them and that this machine does not have
    description: str


def checkpoint_of(info: ModelInfo, machine: Machine) -> Checkpoint | None:
    """The quantization of a model's checkpoint; None where its weights are plain ones."""
    stored = info.stored
    if stored is None:
        return None
    counted = "trained on and counted as stored, so that its own weights cannot be trained"
    if stored.treatment == "dequantized":
        counted = "dequantized while it is loaded, and counted so"
    missing = missing_packages(stored)
    text = f"{stored.quantization} on disk, {counted}"
    if missing and machine.here:
        text += f"; training is refused here until {' and '.join(missing)} can load it: pip install {' '.join(missing)}"
    elif stored.packages:
        text += f"; the machine needs {' and '.join(stored.packages)} to load it"
    return Checkpoint(stored.quantization, stored.treatment, stored.reversible, missing, text)


def effective_quantization(settings: Model, kind_quantizes: str | None, info: ModelInfo | None) -> tuple[str, str]:
    """The quantization in which the base is really held, and why where the recipe's word does not say it."""
    stored = info.stored if info else None
    if stored and stored.treatment == "kept":
        return stored.quantization, "the checkpoint is quantized already"
    if kind_quantizes:
        return kind_quantizes, "the kind of adapter quantizes"
    if stored:
        return settings.quantization, f"the checkpoint is {stored.quantization}, and is dequantized while it is loaded"
    return settings.quantization, ""


def quantization_line(settings: Model, kind_quantizes: str | None, info: ModelInfo | None) -> str:
    """The sentence of `lorakit check`: the quantization asked for, the one in effect, the share and the bytes saved.

    Args:
        settings: the recipe's model section, its dtype resolved.
        kind_quantizes: the quantization in which the adapter kind itself puts the base, if any.
        info: of the base model; None when it is not on this machine.
    """
    effective, reason = effective_quantization(settings, kind_quantizes, info)
    if effective == "none":
        return f"none: {reason or 'the weights as they are'}"
    refused = f"{settings.quantization} was asked for, {effective} is used: {reason}. "
    begin, spec = refused if effective != settings.quantization else "", info.spec if info else None
    if info is None or spec is None or info.stored or effective not in ("q8", "q4", "nf4"):
        when = "here" if info is None else "loaded"
        return f"{begin}{effective}: the share and the bytes saved are known when the model is {when}"
    width = DTYPE_BYTES[settings.dtype]
    share = sum(weight.size for weight in spec.quantizable) / spec.parameters
    before, after = (weight_bytes(spec, word, settings.double_quant, width) for word in ("none", effective))
    return begin + describe_savings(effective, share, before, after)
