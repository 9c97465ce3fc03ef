"""What separates two checkpoints of one model, and whether they can be told apart weight by weight."""

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
from lorakit.model.train_modules import select_train_modules
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
    """Path of a weight that a LoRA can hold -> how PEFT holds it where it has all of them."""
    reasons: dict[str, str]
    """Path of another weight of a matrix's shape -> why a LoRA cannot hold it."""

    def change(self, path: str) -> torch.Tensor:
        """What was added to a weight of the base, in float32.

        Raises:
            UserError: one of the two holds numbers that are not finite.
        """
        tuned, base = self.tuned.read(path), self.base.read(path)
        for weights, values in ((self.tuned, tuned), (self.base, base)):
            if values.is_floating_point() and not bool(values.isfinite().all()):
                raise UserError(f"{weights.folder}: {path} holds numbers that are not finite. Nothing was extracted.")
        return tuned.float().sub_(base)

    def beside(
        self, changed: Iterable[str], adapted: list[str], keep_whole: bool
    ) -> tuple[list[str], bool, dict[str, str]]:
        """Of the changed weights that no layer of an adapter holds: the modules to bring whole, whether they are tied
        embeddings, and why the others are left out, by path.

        Args:
            adapted: the layers with an adapter.
        """
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
        paths, tied = select_train_modules(self.base.model, list(dict.fromkeys(modules)), adapted)
        return paths, tied, reasons

    def _kind(self, path: str) -> str:
        model: Any = self.base.model
        if model.get_submodule(path.rpartition(".")[0]) is model.get_input_embeddings():
            return "it is the embeddings"
        return "it is a vector" if model.state_dict()[path].ndim < 2 else "it is not a linear layer's weight"


def open_pair(tuned: Base, base: Base, progress: Progress) -> CheckpointPair:
    """Two checkpoints, told to be of one architecture by their configurations and the shapes of their weights.

    Raises:
        UserError: they are of different models, or quantized.
    """
    for one in (tuned, base):
        stored = stored_quantization(one.folder)
        if stored:
            raise UserError(
                f"{one.name}: its weights are {stored.quantization}, so that rounding would be taken for training. "
                "Give the unquantized checkpoint."
            )
    opened, original = open_weights(tuned.folder), open_weights(base.folder)
    _check_shapes(tuned, opened, base, original)
    apart = _settings_apart(opened.model.config.to_dict(), original.model.config.to_dict())
    if apart:
        progress.warn(
            f"{tuned.name} and {base.name} differ in their config.json as well ({', '.join(apart)}), which no adapter "
            "holds: the base with the adapter will not answer as the tuned model does"
        )
    dtypes = [stored_dtype(one) for one in (tuned, base)]
    if dtypes[0] != dtypes[1]:
        progress.warn(
            f"{tuned.name} is stored in {dtypes[0]}, {base.name} in {dtypes[1]}: what rounding changed is counted as "
            "change"
        )
    weights = {
        weight.path if weight.fused else f"{weight.path}.weight": weight for weight in list_weights(original.model)
    }
    reasons = {path: weight.unadaptable.partition(",")[0] for path, weight in weights.items() if weight.unadaptable}
    able = [weight for weight in weights.values() if not weight.unadaptable]
    config = LoraConfig(
        r=1,
        target_modules=[weight.path for weight in able if not weight.parameter],
        target_parameters=[weight.parameter for weight in able if weight.parameter] or None,
    )
    holders = {layer.path: layer for layer in adapter_layout(base.folder, config).layers}
    return CheckpointPair(opened, original, list(_shapes(original)), holders, reasons)


# What a configuration says of itself, of files and of generating, and not of what the model computes.
_ASIDE = re.compile(
    r"_name_or_path|architectures|dtype|torch_dtype|transformers_version|use_cache|\w+_token_ids?|id2label|label2id"
)


def _settings_apart(tuned: dict[str, Any], base: dict[str, Any], within: str = "") -> list[str]:
    """The settings of the models that differ, with both values."""
    found = []
    for name in sorted({*tuned, *base}):
        ours, its = tuned.get(name), base.get(name)
        if ours == its or _ASIDE.fullmatch(name):
            continue
        if isinstance(ours, dict) and isinstance(its, dict):
            found += _settings_apart(ours, its, f"{within}{name}.")
        else:
            found.append(f"{within}{name}: {ours} and {its}")
    return found


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and saved buffer of a model; of tied ones by the first of their names."""
    model: Any = weights.model
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named if name in saved}


def _check_shapes(tuned: Base, opened: Weights, base: Base, original: Weights) -> None:
    ours, its = opened.model.config.model_type, original.model.config.model_type
    if ours != its:
        raise UserError(f"{tuned.name} is a {ours} model, {base.name} a {its}. Give two checkpoints of one model.")
    found, expected = _shapes(opened), _shapes(original)
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if not differing:
        return
    name = differing[0]
    one, other = found.get(name), expected.get(name)
    embeddings = original.model.get_input_embeddings().weight
    if one and other and one[1:] == other[1:] and other == tuple(embeddings.shape):
        raise UserError(
            f"{tuned.name} has embeddings of {one[0]:,} tokens, {base.name} of {other[0]:,}: the vocabulary was "
            "resized, which no LoRA can hold. Resize the base in the same way, or keep the tuned model whole."
        )
    count = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    raise UserError(
        f"{tuned.name} and {base.name} are no checkpoints of one model: {name}{count} is {one or 'not'} in the one and "
        f"{other or 'not'} in the other. Give the base that the tuned model was trained from."
    )


def tuned_tokenizer(tuned: Base, base: Base, progress: Progress) -> tuple[Any, Path] | None:
    """The tuned checkpoint's tokenizer, which belongs to the adapter, and its folder; the base's where it has none.

    Raises:
        UserError: the two give one token different ids, so that the weights mean different things.
    """
    ours, its = _tokenizer(tuned.folder), _tokenizer(base.folder)
    if ours is None or its is None:
        lacking = tuned.name if ours is None else base.name
        progress.warn(f"{lacking} has no tokenizer, so that it was not compared with the other's")
        return (ours, tuned.folder) if ours else (its, base.folder) if its else None
    known, expected = ours.get_vocab(), its.get_vocab()
    moved = sorted(token for token in known.keys() & expected.keys() if known[token] != expected[token])
    if moved:
        raise UserError(
            f"{tuned.name} and {base.name} have different tokenizers: {moved[0]!r} is {known[moved[0]]:,} in the one "
            f"and {expected[moved[0]]:,} in the other. Give the base that the tuned model was trained from."
        )
    if known != expected:
        progress.warn(
            f"the tokenizer of {tuned.name} has {len(known.keys() - expected.keys())} tokens that {base.name} has not; "
            "the adapter gets it"
        )
    elif ours.chat_template != its.chat_template:
        progress.say(f"the adapter gets the chat template of {tuned.name}, which is not that of {base.name}")
    return ours, tuned.folder


def _tokenizer(folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions on a damaged tokenizer.json
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {first}") from error
