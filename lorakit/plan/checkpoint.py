"""The base model's own files, before weights are loaded: what a run would refuse of them, their chat template, the
positions that they have, and what their quantization means. Without torch, but for the tokenizer."""

from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import BaseModelError, UserError
from lorakit.hardware.machine import Machine
from lorakit.model.base_files import check_base_files, has_tokenizer
from lorakit.model.config_values import Positions
from lorakit.model.quantization_config import (
    CheckpointQuantization,
    describe_savings,
    missing_packages,
    refuse_irreversible,
)
from lorakit.model.resolve import Base
from lorakit.plan.memory import DTYPE_BYTES, effective_quantization, weight_bytes
from lorakit.plan.model_info import ModelInfo, find_model_folder, hub_snapshot
from lorakit.recipe.schema import Model, Recipe

if TYPE_CHECKING:
    from lorakit.data.chat_template import ChatTemplate


def check_local_base(recipe: Recipe, complete: bool = True) -> None:
    """Refuse a base model whose files a run would refuse, where they are here: a file is missing (where `complete`),
    damaged or pickled, code is to be run, or the template reads no such variable."""
    model, path = recipe.model, Path(recipe.model.base)
    local = path if path.is_absolute() and path.is_dir() else None
    folder = local or (None if path.is_absolute() else hub_snapshot(model.base, model.revision))
    if model.template_variables or model.template_date != "auto":
        _check_template(model, folder)
    if folder:
        check_base_files(folder, complete and folder == local)
    if local and complete and not has_tokenizer(local):
        raise BaseModelError(f"{local} has no tokenizer, such as tokenizer.json. Fetch the model again.")
    if path.is_absolute() and not local:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if not is_gguf:
            raise BaseModelError(f"{path}: no readable GGUF file: it does not begin as one does. Fetch it again.")
        if not find_spec("gguf"):
            raise BaseModelError(f"{path}: GGUF files need the package gguf: pip install 'lorakit[gguf]'.")


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


def load_template(recipe: Recipe, base: Base) -> "ChatTemplate":
    """The tokenizer in the base's folder with the recipe's chat template, or its own. A `UserError` where it cannot be
    loaded, or the template does not read the recipe's variables or day."""
    # transformers, and torch with it
    from lorakit.data.chat_template import ChatTemplate
    from lorakit.data.template_source import check_template_date, writes_date
    from lorakit.model.tokenizer import load_tokenizer, quiet_libraries, stop_words

    quiet_libraries()
    tokenizer = load_tokenizer(base, recipe.model.chat_template)
    given, writes = recipe.model.template_date, writes_date(tokenizer.chat_template)
    check_template_date(given, writes)
    template = ChatTemplate(
        tokenizer,
        recipe.data.train_on,
        recipe.data.system,
        stop_words(base, tokenizer),
        recipe.model.template_variables,
        (date.today().isoformat() if given == "auto" else given) if writes else None,
    )
    template.check_variables()
    return template


def find_template(recipe: Recipe) -> "ChatTemplate | None":
    """`load_template` where the tokenizer is on this machine, whether the weights are or not; else None."""
    folder = find_model_folder(recipe.model.base, recipe.model.revision)
    if folder is None or not has_tokenizer(folder):
        return None
    return load_template(recipe, Base(recipe.model.base, folder, "on this machine"))


def describe_missing_files(recipe: Recipe) -> str | None:
    """What of the base's files a run would miss, of a base that `check_local_base` takes; None where nothing is."""
    try:
        check_local_base(recipe)
    except UserError as error:
        return f"{error} It is planned all the same; a run would be refused"
    return None


def refuse_by_config(recipe: Recipe, facts: ModelInfo | None) -> None:
    """Refuse rows or answers of more tokens than the model has positions for, and a merge into weights whose
    quantization cannot be undone."""
    if recipe.output.merged and facts:
        refuse_irreversible(facts.stored, recipe.model.base)
    positions = facts.positions if facts else None
    if positions is None or not positions.hard:
        return
    why = f"{positions.limit:,} positions ({positions.key}), each with an embedding of its own, and none for more"
    longest, answer = recipe.data.max_length, recipe.evaluate.max_new_tokens
    if longest > positions.limit:
        raise UserError(
            f"data.max_length: rows of {longest:,} tokens are allowed, but {recipe.model.base} has {why}. "
            f"Write max_length: {positions.limit} or less."
        )
    if answer > positions.limit:
        raise UserError(
            f"evaluate.max_new_tokens: answers of {answer:,} tokens are asked for, but {recipe.model.base} has {why}. "
            f"Write max_new_tokens: {max(1, positions.limit // 2)}, which leaves room for the prompt."
        )


def beyond_training(recipe: Recipe, facts: ModelInfo | None, longest: int | None = None) -> str:
    """A warning where rows are longer than what the model was trained on; empty where none is due. `longest`: the
    longest row in tokens; None where no row has been read, which leaves `data.max_length`."""
    positions = facts.positions if facts else None
    length = recipe.data.max_length if longest is None else min(longest, recipe.data.max_length)
    if positions is None or positions.hard or length <= positions.limit:
        return ""
    rows = f"rows may have {length:,} tokens" if longest is None else f"the longest row has {length:,} tokens"
    return f"data.max_length: {rows}, {unseen(positions)}. Write max_length: {positions.limit}, or choose another model"


def unseen(positions: Positions) -> str:
    """A clause on what later positions mean for a model without a limit."""
    return (
        f"but the model was trained on {positions.limit:,} positions ({positions.key}): later ones are computed, but "
        "it has never seen any, and mostly predicts badly there"
    )


def describe_checkpoint(stored: CheckpointQuantization, machine: Machine) -> str:
    """What follows from the quantization that the weights have on disk, in a sentence."""
    counted = "trained on and counted as stored, so that its own weights cannot be trained"
    if stored.treatment == "dequantized":
        counted = "dequantized while it is loaded, and counted so"
    text = f"{stored.quantization} on disk, {counted}"
    if machine.here and (missing := missing_packages(stored)):
        text += f"; training is refused here until {' and '.join(missing)} can load it: pip install {' '.join(missing)}"
    elif stored.packages:
        text += f"; the machine needs {' and '.join(stored.packages)} to load it"
    return text


def quantization_line(settings: Model, kind_quantizes: str | None, info: ModelInfo | None) -> str:
    """The sentence of `lorakit check`: the quantization asked for, the one in effect, the share and the bytes saved.
    `settings` have their dtype resolved; `kind_quantizes`: how the adapter's kind itself quantizes the base."""
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
