"""The weights of a model folder by their paths in the model, one at a time, and what an adapter saw of them while it
trained: rounded to the type of the training, and quantized.

A checkpoint may name its tensors otherwise than the model does, and hold them in other pieces: one tensor for each
expert, query, key and value in one. transformers converts them while loading (transformers/core_model_loading.py); here
the same conversions are applied to one weight at a time, and back.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from transformers import core_model_loading as conversion
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lorakit.errors import BaseModelError, UserError
from lorakit.model.base_files import StoredTensor, list_tensors
from lorakit.model.config_values import read_json, untied_config
from lorakit.model.load import DTYPES
from lorakit.model.safetensors_io import TYPES, pieces, read_tensor
from lorakit.model.spec_from_meta import meta_model
from lorakit.recipe.schema import Model
from lorakit.registry import QUANTIZERS

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Tensors of the files, and the weights of the model that are made of them; mostly one and one."""

    names: tuple[str, ...]  # in the files
    paths: tuple[str, ...]  # in the model
    patterns: tuple[str, ...] = ()  # the converter's, one for each name
    converter: Any = None  # None where the tensor of the file is the weight
    target: str = ""  # the path by which the converter is called


@dataclass
class Weights:
    """What a model folder holds, by path in the model. Only names are kept in memory."""

    folder: Path
    model: Any = field(repr=False)  # without its weights, on torch's meta device
    tensors: dict[str, StoredTensor] = field(repr=False)
    groups: list[Group] = field(repr=False)
    unused: list[str]  # tensors of the files that the model has no place for

    def __post_init__(self) -> None:
        self.group_by_path = {path: group for group in self.groups for path in group.paths}
        self.ties = _find_ties(self.model)

    def group_of(self, path: str) -> Group:
        """What a weight of the model is made of; of tied weights, every path gives the one in the files."""
        for name in (path, *self.ties.get(path, ())):
            if name in self.group_by_path:
                return self.group_by_path[name]
        raise UserError(f"{self.folder}: its weights files lack {path}, which the model needs.")

    def read(self, path: str) -> torch.Tensor:
        """One weight of the model, in float32, on the CPU, in a new tensor."""
        values = self.read_group(self.group_of(path))
        return values[path] if path in values else values[(self.ties[path] & values.keys()).pop()]

    def pieces(self, path: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The same some rows at a time where the file holds it so, each with its first row, valid until the next."""
        group = self.group_of(path)
        stored = self.tensors[group.names[0]]
        if group.converter is None and stored.is_plain and stored.shape and stored.size:
            yield from pieces(stored)
        else:
            yield 0, self.read(path)

    def read_group(self, group: Group) -> Values:
        """The weights of one group by path, in float32."""

        def read(name: str) -> torch.Tensor:
            return read_tensor(self.tensors[name], torch.float32 if self.tensors[name].is_plain else None)

        if group.converter is None:
            return {group.paths[0]: read(group.names[0])}
        return _convert(self.model, group, read)

    def names_in_files(self, group: Group, values: Values) -> Values:
        """The inverse of `read_group`: the tensors of the files by name, from the weights by path."""
        if group.converter is None:
            return {group.names[0]: values[group.paths[0]]}
        named = {}  # transformers leaves out prefixes that the files may have
        for made, value in conversion.revert_weight_conversion(self.model, values).items():
            pairs = ((name, f".{name}", f".{made}") for name in group.names)
            named[next((name for name, one, other in pairs if one.endswith(other) or other.endswith(one)), "")] = value
        if sorted(named) != sorted(group.names):
            others = f"{group.names[0]} and the other tensors of its file"
            raise BaseModelError(f"{group.target} cannot be split again into {others}.")
        return named


def open_weights(folder: Path) -> Weights:
    """The weights of a model folder, of which only the names are read yet. UserError where a file is missing,
    damaged or does not fit the config, or it is not a causal language model."""
    model, tensors = meta_model(folder), list_tensors(folder)
    state = model.state_dict()
    converters = [entry for entry in get_model_conversion_mapping(model) if _converts(entry)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    single: dict[str, str] = {}
    gathered: dict[str, list[tuple[str, str]]] = {}
    unused = []
    for name, path, pattern in paths_of_tensors(model, tensors):
        if path not in state:
            unused.append(name)
        elif pattern is None:
            single[path] = name
        else:
            gathered.setdefault(path, []).append((name, pattern))
    groups = [Group((name,), (path,)) for path, name in single.items() if path not in gathered]
    for path, members in gathered.items():
        names, patterns = zip(*members, strict=True)
        group = Group(names, (), patterns, by_pattern[patterns[0]], path)
        converted = _convert(model, group, lambda name: torch.empty(tensors[name].shape, device="meta"))
        groups.append(replace(group, paths=tuple(converted)))
    weights = Weights(folder, model, tensors, groups, unused)
    _check_against_model(weights, state)
    return weights


def paths_of_tensors(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each name in the files of a model with the path in the model that transformers gives it, which may be none of the
    model's, and the converter's pattern, where a weight is made of it."""
    state, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, conversion.WeightRenaming)]
    converters = [entry for entry in mapping if _converts(entry)]
    for name in sorted(names, key=conversion.dot_natural_key):
        path, pattern = conversion.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if path not in state and name in state:
            path, pattern = name, None
        yield name, path, pattern


def _converts(entry: Any) -> bool:
    return isinstance(entry, conversion.WeightConverter)


def untied(weights: Weights) -> Weights:
    """The same weights for a model whose config ties nothing: ends that the files lack are read from the other end.
    UserError where the family ties its weights whatever the config says."""
    config = untied_config(read_json(weights.folder / "config.json"))
    model = meta_model(config)
    ties = _find_ties(model)
    if ties:
        raise UserError(f"{weights.folder}: {min(ties)} is tied in every model of this family and cannot be untied.")
    tensors, groups = dict(weights.tensors), list(weights.groups)
    for path in model.state_dict():
        if path in weights.group_by_path or path not in weights.ties:
            continue
        group = weights.group_of(path)
        if group.converter is not None:
            raise UserError(f"{weights.folder}: {path} is made of several tensors and cannot be written alone.")
        (name,) = conversion.revert_weight_conversion(model, {path: torch.empty(0)})
        tensors[name] = tensors[group.names[0]]
        groups.append(Group((name,), (path,)))
    return replace(weights, model=model, tensors=tensors, groups=groups)


def _check_against_model(weights: Weights, state: Values) -> None:
    for group in weights.groups:
        name, path = group.names[0], group.paths[0]
        stored = [weights.tensors[name] for name in group.names]
        for tensor in stored:
            if tensor.dtype not in TYPES or tensor.dtype.startswith("F8"):
                reason = f"no adapter can be added to {name}, which is stored as {tensor.dtype}"
                raise UserError(f"{weights.folder}: {reason}.")
        if group.converter is None and stored[0].shape != tuple(state[path].shape):
            shapes = f"{stored[0].shape} in the files and {tuple(state[path].shape)} in the model"
            raise UserError(f"{weights.folder}: {name} is {shapes} that its config.json describes.")
        twice = min(weights.ties.get(path, set()) & weights.group_by_path.keys(), default=None)
        if twice and not torch.equal(weights.read(path), weights.read(twice)):
            reason = f"{path} and {twice} are one weight by its config.json, and two in its files"
            raise UserError(f"{weights.folder}: {reason}. Write tie_word_embeddings: false into the config.json.")


def _convert(model: Any, group: Group, read: Callable[[str], torch.Tensor]) -> Values:
    converter = copy.deepcopy(group.converter)
    for name, pattern in zip(group.names, group.patterns, strict=True):
        converter.add_tensor(group.target, name, pattern, lambda name=name: read(name))
    converted = converter.convert(group.target, model=model, config=model.config)
    return {path: value[0] if isinstance(value, list) else value for path, value in converted.items()}


def _find_ties(model: Any) -> dict[str, set[str]]:
    """For each path of a weight that a model uses in several places, the other paths."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    return {name: names - {name} for names in owners.values() if len(names) > 1 for name in names}


@dataclass(frozen=True)
class WeightPrecision:
    """How precise the frozen weights of a model are while an adapter trains on them."""

    settings: Model
    transposed: dict[str, bool]  # the paths of the quantized weights, and whether they are transposed before (Conv1D)
    float32_parts: Set[str] = frozenset()  # parts of paths that transformers keeps in float32 whatever it is asked for

    def __call__(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """The float32 weight that the model computes with, from the one in the files; the same if nothing rounds it.
        The quantizer's own code rounds it, on the CPU."""
        if not weight.is_floating_point():
            return weight
        rounded = weight.to(self._dtype(path))
        if path not in self.transposed:
            return rounded.float()
        back = _quantize_and_back(rounded.T if self.transposed[path] else rounded, self.settings).float()
        return back.T.contiguous() if self.transposed[path] else back

    def read(self, weights: Weights, path: str) -> torch.Tensor:
        """One weight of a model folder in this precision, in float32."""
        return self(path, weights.read(path))

    def pieces(self, weights: Weights, path: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The same some rows at a time, unless it is quantized as a whole; a piece is valid until the next one."""
        if path in self.transposed:
            yield 0, self.read(weights, path)
            return
        for row, piece in weights.pieces(path):
            yield row, self(path, piece)

    def rounds(self, weights: Weights, group: Group) -> bool:
        """Whether the training saw other numbers than the files hold, for any weight of a group."""
        stored = [TYPES.get(weights.tensors[name].dtype, torch.uint8) for name in group.names]
        pairs = [(dtype, self._dtype(path)) for dtype in stored if dtype.is_floating_point for path in group.paths]
        is_rounded = any(torch.promote_types(dtype, narrow) != narrow for dtype, narrow in pairs)
        return is_rounded or any(path in self.transposed for path in group.paths)

    def differs(self, weights: Weights) -> bool:
        """Whether the training saw other numbers than the files hold, anywhere."""
        return any(self.rounds(weights, group) for group in weights.groups)

    def _dtype(self, path: str) -> torch.dtype:
        return torch.float32 if self.float32_parts & set(path.split(".")) else DTYPES[self.settings.dtype]


def training_precision(weights: Weights, settings: Model) -> WeightPrecision:
    """The precision of a model loaded with `settings`; `settings.dtype` is the type of the training."""
    parts = {*(weights.model._keep_in_fp32_modules_strict or ())}
    if settings.dtype == "float16":
        parts |= {*(weights.model._keep_in_fp32_modules or ())}
    if settings.quantization == "none":
        return WeightPrecision(settings, {}, parts)
    model = meta_model(weights.folder)
    config = QUANTIZERS[settings.quantization].function(settings, DTYPES[settings.dtype])
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    transposed = {
        f"{name}.weight": issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }
    return WeightPrecision(settings, transposed, parts)


def stored_precision(settings: Model) -> WeightPrecision:
    """Every weight as it is in the files."""
    return WeightPrecision(settings.model_copy(update={"dtype": "float32", "quantization": "none"}), {})


def _quantize_and_back(weight: torch.Tensor, settings: Model) -> torch.Tensor:
    quantized: Any
    if settings.quantization == "q8":
        quantized = Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False).to("cpu")
        return int8_vectorwise_dequant(quantized.CB, quantized.SCB)
    options = {"quant_type": {"nf4": "nf4", "q4": "fp4"}[settings.quantization], "requires_grad": False}
    quantized = Params4bit(weight.contiguous(), compress_statistics=settings.double_quant, **options).to("cpu")
    return dequantize_4bit(quantized.data, quantized.quant_state).to(weight.dtype)
