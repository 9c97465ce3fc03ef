"""Two checkpoints of one model, compared weight by weight."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from lorakit.errors import UserError
from lorakit.merge.peft_layout import AdapterLayer, adapter_layout
from lorakit.model.load import stored_dtype
from lorakit.model.module_inventory import list_weights
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.resolve import Base
from lorakit.model.state_dict import Weights, open_weights
from lorakit.model.targets import select_train_modules
from lorakit.progress import Progress

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class CheckpointPair:
    """Two checkpoints of one architecture."""

    tuned: Weights
    base: Weights
    paths: list[str]
    """Every weight, tied ones once."""
    holders: dict[str, AdapterLayer]
    """Path of a weight that a LoRA can hold -> its layer in an adapter of all of them."""
    reasons: dict[str, str]
    """Path of another weight of a matrix's shape -> why a LoRA cannot hold it."""

    def change(self, path: str) -> torch.Tensor:
        """What was added to a weight of the base, in float32."""
        tuned, base = self.tuned.read(path), self.base.read(path)
        for weights, values in ((self.tuned, tuned), (self.base, base)):
            if values.is_floating_point() and not bool(values.isfinite().all()):
                raise UserError(f"{weights.folder}: {path} holds numbers that are not finite. Nothing was extracted.")
        return tuned.float().sub_(base)

    def sort_out_others(
        self, changed: Iterable[str], adapted: list[str], keep_whole: bool
    ) -> tuple[list[str], bool, dict[str, str]]:
        """Of the changed weights that no layer of an adapter holds: the modules to hold whole, whether they are tied
        embeddings, and why the others are left out, by path. `adapted` are the layers with an adapter."""
        modules, reasons = [], {}
        for path in changed:
            module = path.rpartition(".")[0]
            if path in self.holders:
                continue
            if any(f"{layer}.".startswith(f"{module}.") for layer in adapted):
                reasons[path] = "it belongs to a module that gets an adapter"
            elif not keep_whole:
                reasons[path] = self.reasons.get(path) or self._kind(path)
            else:
                try:
                    select_train_modules(self.base.model, [module], adapted)
                    modules.append(module)
                except UserError as error:
                    reasons[path] = str(error).removeprefix("adapter.train_modules: ").removesuffix(" Remove it.")
        if not modules:
            return [], False, reasons
        return *select_train_modules(self.base.model, list(dict.fromkeys(modules)), adapted), reasons

    def _kind(self, path: str) -> str:
        model: Any = self.base.model
        if model.get_submodule(path.rpartition(".")[0]) is model.get_input_embeddings():
            return "it is the embeddings"
        return "it is a vector" if model.state_dict()[path].ndim < 2 else "it is not a linear layer's weight"


def open_pair(tuned: Base, base: Base, progress: Progress) -> CheckpointPair:
    """Two unquantized checkpoints whose configurations and shapes are those of one architecture."""
    for one in (tuned, base):
        stored = stored_quantization(one.folder)
        if stored:
            raise UserError(
                f"{one.name}: its weights are {stored.quantization}, so that rounding would be taken for training. "
                "Give the unquantized checkpoint."
            )
    opened, original = open_weights(tuned.folder), open_weights(base.folder)
    _check_shapes(tuned, opened, base, original)
    settings = _differing_settings(opened.model.config.to_dict(), original.model.config.to_dict())
    if settings:
        progress.warn(
            f"{tuned.name} and {base.name} differ in their config.json as well ({', '.join(settings)}), which no "
            "adapter holds: the base with the adapter will not answer as the tuned model does"
        )
    if stored_dtype(tuned) != stored_dtype(base):
        progress.warn(
            f"{tuned.name} is stored in {stored_dtype(tuned)}, {base.name} in {stored_dtype(base)}: what rounding "
            "changed is counted as change"
        )
    reasons, modules, parameters = {}, [], []
    for weight in list_weights(original.model):
        if weight.unadaptable:
            path = weight.path if weight.fused else f"{weight.path}.weight"
            reasons[path] = weight.unadaptable.partition(",")[0]
        elif weight.parameter:
            parameters.append(weight.parameter)
        else:
            modules.append(weight.path)
    config = LoraConfig(r=1, target_modules=modules, target_parameters=parameters or None)
    holders = {layer.path: layer for layer in adapter_layout(base.folder, config)[0]}
    return CheckpointPair(opened, original, list(_shapes(original)), holders, reasons)


# What a configuration says of itself, of files and of generating, and not of what the model computes.
_IRRELEVANT = re.compile(
    r"_name_or_path|architectures|dtype|torch_dtype|transformers_version|use_cache|\w+_token_ids?|id2label|label2id"
)


def _differing_settings(tuned: dict[str, Any], base: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings of the models that differ, with both values."""
    differing = []
    for name in sorted({*tuned, *base}):
        one, other = tuned.get(name), base.get(name)
        if one == other or _IRRELEVANT.fullmatch(name):
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            differing += _differing_settings(one, other, f"{prefix}{name}.")
        else:
            differing.append(f"{prefix}{name}: {one} and {other}")
    return differing


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and saved buffer of a model; of tied ones by the first of their names."""
    model: Any = weights.model
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named if name in saved}


def _check_shapes(tuned: Base, opened: Weights, base: Base, original: Weights) -> None:
    kinds = opened.model.config.model_type, original.model.config.model_type
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{tuned.name} is a {kinds[0]} model, {base.name} a {kinds[1]}. Give two checkpoints of one model."
        )
    shapes, expected = _shapes(opened), _shapes(original)
    differing = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    if not differing:
        return
    one, other = shapes.get(differing[0]), expected.get(differing[0])
    embeddings = original.model.get_input_embeddings().weight
    if one and other and one[1:] == other[1:] and other == tuple(embeddings.shape):
        raise UserError(
            f"{tuned.name} has embeddings of {one[0]:,} tokens, {base.name} of {other[0]:,}: the vocabulary was "
            "resized, which no LoRA can hold. Resize the base in the same way, or keep the tuned model whole."
        )
    count = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    raise UserError(
        f"{tuned.name} and {base.name} are not checkpoints of one model: {differing[0]}{count} is {one or 'not'} in "
        f"the one and {other or 'not'} in the other. Give the base that the tuned model was trained from."
    )


def tuned_tokenizer(tuned: Base, base: Base, progress: Progress) -> tuple[Any, Path] | None:
    """The tokenizer that the adapter gets, with its folder: the tuned checkpoint's, or the base's where it has none."""
    own, original = _load_tokenizer(tuned.folder), _load_tokenizer(base.folder)
    if own is None or original is None:
        lacking = tuned.name if own is None else base.name
        progress.warn(f"{lacking} has no tokenizer, so that it was not compared with the other's")
        return (own, tuned.folder) if own else (original, base.folder) if original else None
    ids, expected = own.get_vocab(), original.get_vocab()
    token = min((token for token in ids.keys() & expected.keys() if ids[token] != expected[token]), default=None)
    if token is not None:
        raise UserError(
            f"{tuned.name} and {base.name} have different tokenizers: {token!r} is {ids[token]:,} in the one and "
            f"{expected[token]:,} in the other. Give the base that the tuned model was trained from."
        )
    if ids != expected:
        progress.warn(
            f"the tokenizer of {tuned.name} has {len(ids.keys() - expected.keys())} tokens that {base.name} lacks; the "
            "adapter gets it"
        )
    elif own.chat_template != original.chat_template:
        progress.say(f"the adapter gets the chat template of {tuned.name}, which is not that of {base.name}")
    return own, tuned.folder


def _load_tokenizer(folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions on a damaged tokenizer.json
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {first}") from error
