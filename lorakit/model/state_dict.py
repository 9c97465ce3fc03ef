"""The weights of a model folder by their paths in the model, one at a time.

A checkpoint may name its tensors otherwise than the model does, and hold them in other pieces: one tensor for each
expert, query, key and value in one. transformers converts them while loading (transformers/core_model_loading.py); here
the same conversions are applied to one weight at a time, and back.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lorakit.errors import UserError
from lorakit.model.safetensors_header import StoredTensor, list_tensors
from lorakit.model.safetensors_reader import TYPES, pieces, read_tensor
from lorakit.model.spec_from_meta import meta_model

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Tensors of the files, and the weights of the model that are made of them; mostly one and one."""

    names: tuple[str, ...]
    """In the files."""
    paths: tuple[str, ...]
    """In the model."""
    patterns: tuple[str, ...] = ()
    """Of the converter, for each name; nothing where tensors are taken as they are."""
    peft_renames: tuple[str, ...] = ()
    """The names as the converter knows them."""
    converter: Any = None
    target: str = ""
    """The path by which the converter is called."""


@dataclass
class Weights:
    """What a model folder holds, by path in the model. Nothing is kept in memory but names."""

    folder: Path
    model: Any = field(repr=False)
    """The model without its weights, on torch's meta device."""
    tensors: dict[str, StoredTensor] = field(repr=False)
    groups: list[Group] = field(repr=False)
    unused: list[str]
    """Tensors of the files that the model has no place for."""

    def __post_init__(self) -> None:
        self._group_of = {path: group for group in self.groups for path in group.paths}

    def paths(self) -> list[str]:
        """The paths of all parameters and buffers that the files hold."""
        return list(self._group_of)

    def group_of(self, path: str) -> Group:
        """What a weight of the model is made of; of tied weights, every path gives the one in the files.

        Raises:
            UserError: the files do not hold it.
        """
        group = self._group_of.get(path) or next(
            (self._group_of[other] for other in self.tied_to(path) if other in self._group_of), None
        )
        if group is None:
            raise UserError(f"{self.folder}: its weights files lack {path}, which the model needs.")
        return group

    def tied_to(self, path: str) -> set[str]:
        """The other paths of a weight that the model uses in several places."""
        return self._ties.get(path, set())

    def tied_paths(self) -> list[str]:
        """Every path of a weight that the model uses in several places."""
        return sorted(self._ties)

    @property
    def _ties(self) -> dict[str, set[str]]:
        known = self.__dict__.get("_known_ties")
        if known is None:
            known = self.__dict__["_known_ties"] = _ties_of(self.model)
        return dict(known)

    def read(self, path: str) -> torch.Tensor:
        """One weight of the model, in float32, on the CPU, in memory of its own.

        Raises:
            UserError: the files do not hold it.
        """
        group = self.group_of(path)
        values = self.read_group(group)
        return values[path] if path in values else values[(self.tied_to(path) & set(group.paths)).pop()]

    def pieces(self, path: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The same some rows at a time where the file holds it as it is, each piece with the number of its first row.

        A piece is good until the next one is asked for.
        """
        group = self.group_of(path)
        stored = self.tensors[group.names[0]]
        if group.converter is None and stored.is_plain and stored.shape and stored.size:
            yield from pieces(stored)
        else:
            yield 0, self.read(path)

    def read_group(self, group: Group) -> Values:
        """The weights of one group by path, in float32."""
        read = {name: self.tensors[name] for name in group.names}
        if group.converter is None:
            return {group.paths[0]: _read(read[group.names[0]])}
        return _converted(self.model, group, lambda name: _read(read[name]))

    def names_in_files(self, group: Group, values: Values) -> Values:
        """The inverse of `read_group`: the tensors of the files by name, from the weights of the model."""
        if group.converter is None:
            return {group.names[0]: values[group.paths[0]]}
        return _reverted(self.model, group, values)


def open_weights(folder: Path) -> Weights:
    """The weights of a model folder, of which nothing is read yet but the names.

    Raises:
        UserError: a file is missing, damaged or does not fit the config, or the config is of no causal language model.
    """
    model, tensors = meta_model(folder), list_tensors(folder)
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    single: dict[str, str] = {}
    gathered: dict[str, list[tuple[str, str]]] = {}
    unused = []
    for name in sorted(tensors, key=dot_natural_key):
        path, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if path not in state and name in state:
            path, pattern = name, None
        if path not in state:
            unused.append(name)
        elif pattern is None:
            single[path] = name
        else:
            gathered.setdefault(path, []).append((name, pattern))
    groups = [Group((name,), (path,)) for path, name in single.items() if path not in gathered]
    for path, members in gathered.items():
        names, patterns = zip(*members, strict=True)
        renamed = tuple(apply_renamings(name, renamings) for name in names)
        group = Group(names, (), patterns, renamed, by_pattern[patterns[0]], path)
        made = _converted(model, group, lambda name: torch.empty(tensors[name].shape, device="meta"))
        groups.append(replace(group, paths=tuple(made)))
    weights = Weights(folder, model, tensors, groups, unused)
    _check(weights, state)
    return weights


def untied(weights: Weights) -> Weights:
    """The same as a model whose config ties nothing: the ends that the files lack are read from those that they have.

    Raises:
        UserError: the family ties its weights whatever the config says.
    """
    config = untied_config(json.loads((weights.folder / "config.json").read_text(encoding="utf-8")))
    model = meta_model(config)
    ties = _ties_of(model)
    if ties:
        raise UserError(
            f"{weights.folder}: {min(ties)} is tied in every model of this family: its ends cannot be apart."
        )
    tensors, groups, known = dict(weights.tensors), list(weights.groups), weights.paths()
    for path in (path for path in model.state_dict() if path not in known and weights.tied_to(path)):
        group = weights.group_of(path)
        if group.converter is not None:
            raise UserError(f"{weights.folder}: {path} is made of several tensors, and cannot be written on its own.")
        (name,) = revert_weight_conversion(model, {path: torch.empty(0)})
        tensors[name] = tensors[group.names[0]]
        groups.append(Group((name,), (path,)))
    return replace(weights, model=model, tensors=tensors, groups=groups)


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """What is in a config.json, for a model whose input and output embeddings are two weights."""
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return changed


def _check(weights: Weights, state: Values) -> None:
    """Refuse files that the model of the config would not take, or take otherwise than it says."""
    for group in weights.groups:
        stored = [weights.tensors[name] for name in group.names]
        strange = next((one for one in stored if one.dtype not in TYPES or one.dtype.startswith("F8")), None)
        if strange:
            raise UserError(
                f"{weights.folder}: {group.names[0]} is stored as {strange.dtype}, to which no adapter can be added."
            )
        if group.converter is None and stored[0].shape != tuple(state[group.paths[0]].shape):
            raise UserError(
                f"{weights.folder}: {group.names[0]} is {stored[0].shape} in the files and "
                f"{tuple(state[group.paths[0]].shape)} in the model that its config.json describes."
            )
        twice = [path for path in weights.tied_to(group.paths[0]) if path in weights.paths()]
        if twice and not torch.equal(weights.read(group.paths[0]), weights.read(twice[0])):
            raise UserError(
                f"{weights.folder}: {group.paths[0]} and {twice[0]} are one weight by its config.json, and two in its "
                "files. Write tie_word_embeddings: false into the config.json."
            )


def _converted(model: Any, group: Group, read: Callable[[str], torch.Tensor]) -> Values:
    converter = copy.deepcopy(group.converter)
    for name, pattern in zip(group.names, group.patterns, strict=True):
        converter.add_tensor(group.target, name, pattern, lambda name=name: read(name))
    made = converter.convert(group.target, model=model, config=model.config)
    return {path: value[0] if isinstance(value, list) else value for path, value in made.items()}


def _reverted(model: Any, group: Group, values: Values) -> Values:
    reverse = group.converter.reverse_transform()
    target = ""
    for path in group.paths:
        target, pattern = reverse.rename_source_key(path)
        reverse.add_tensor(target, path, pattern, values[path])
    made = reverse.convert(target, model=model, config=model.config)
    pieces = [value[0] if isinstance(value, list) else value for value in made.values()]
    return dict(zip(_in_order(group, list(made)), pieces, strict=True))


def _in_order(group: Group, made: list[str]) -> list[str]:
    """The names in the files of the pieces that a reversed converter names as it knows them, at times with a prefix."""
    names = {f".{renamed}": name for name, renamed in zip(group.names, group.peft_renames, strict=True)}
    found = [
        next((name for end, name in names.items() if f".{piece}".endswith(end) or end.endswith(f".{piece}")), "")
        for piece in made
    ]
    if sorted(found) != sorted(group.names):
        raise UserError(
            f"model.base: {group.target} cannot be taken apart again into {group.names[0]} and the others of its file."
        )
    return found


def _ties_of(model: Any) -> dict[str, set[str]]:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    return {name: names - {name} for names in owners.values() if len(names) > 1 for name in names}


def _read(stored: StoredTensor) -> torch.Tensor:
    return read_tensor(stored, torch.float32 if stored.is_plain else None)
