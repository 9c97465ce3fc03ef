"""Keys and values of prompts computed one at a time: what the next prompt begins with too, and a batch made of them."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# How many tokens' room a layer makes at least, and by what share of its own length it grows.
_LEAST_ROOM, _GROWTH = 64, 1 / 4


class RoomyLayer(DynamicLayer):
    """A layer with room for tokens to come. transformers' own copies all keys and values for each new token."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor] = []
        self._seen: list[Any] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states (rows, heads, new tokens, width); returns all keys and values, views of the room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        length = used + key_states.shape[-2]
        # Other tensors than the views that were handed out: rows were dropped, or tokens.
        moved = self.keys is not self._seen[0] or self.values is not self._seen[1]
        if not self._room or moved or length > self._room[0].shape[-2]:
            size = length + max(_LEAST_ROOM, int(length * _GROWTH))
            self._room = [new.new_empty((*new.shape[:-2], size, new.shape[-1])) for new in (key_states, value_states)]
            if used:
                for room, old in zip(self._room, (self.keys, self.values), strict=True):
                    room[..., :used, :] = old
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., used:length, :] = new
        self.keys, self.values = self._seen = [room[..., :length, :] for room in self._room]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order. Where they are the first ones, but that some from behind them fill gaps, no
        other row is copied, and the room stays."""
        chosen = indices.tolist()
        moved = [(to, row) for to, row in enumerate(chosen) if to != row]
        if not self._room or self.keys is not self._seen[0] or any(row < len(chosen) for _, row in moved):
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        for room in self._room:
            for to, row in moved:
                room[to, :, :length] = room[row, :, :length]
        self._room = [room[: len(chosen)] for room in self._room]
        self.keys, self.values = self._seen = [room[..., :length, :] for room in self._room]


def can_change_rows(cache: Any) -> bool:
    """Whether the rows of all that this cache holds can be dropped and put together: transformers leaves states of
    linear attention alone."""
    layers = getattr(cache, "layers", None) or [None]
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer) for layer in layers)


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    unequal = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unequal, min(len(one), len(other)))


def start_of(cache: Any, tokens: int) -> Any | None:
    """A cache of the first tokens of this one, which stays as it is; None where a layer no longer holds them."""
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    start = copy.copy(cache)
    start.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in start.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
    return start


def row_of(cache: Any, number: int, tokens: int) -> Any:
    """The cache of one row of a batch that was padded on the left, of its last `tokens` tokens."""
    row = copy.copy(cache)
    row.layers = [_row_of_layer(layer, number, tokens) for layer in cache.layers]
    return row


def _row_of_layer(layer: Any, number: int, tokens: int) -> Any:
    if not layer.is_initialized:
        return layer
    row = copy.copy(layer) if type(layer) is DynamicSlidingWindowLayer else DynamicLayer()
    row.lazy_initialization(layer.keys, layer.values)
    length = min(tokens, layer.keys.shape[-2])
    row.keys, row.values = (
        states[number : number + 1, :, states.shape[-2] - length :].clone() for states in (layer.keys, layer.values)
    )
    if hasattr(row, "cumulative_length"):
        row.cumulative_length = tokens
    return row


def stacked(caches: Sequence[Any]) -> Any:
    """One cache of a row for each of `caches`, padded on the left. They are emptied on the way."""
    whole = copy.copy(caches[0])
    longest = max(cache.get_seq_length() for cache in caches)
    whole.layers = [_stacked_layers([cache.layers[at] for cache in caches], longest) for at in range(len(whole.layers))]
    return whole


def _stacked_layers(rows: Sequence[Any], longest: int) -> Any:
    if not rows[0].is_initialized:
        return rows[0]  # of a layer that attends to the keys and values of another one
    layer = copy.copy(rows[0]) if type(rows[0]) is DynamicSlidingWindowLayer else RoomyLayer()
    layer.lazy_initialization(rows[0].keys, rows[0].values)
    widest = max(row.keys.shape[-2] for row in rows)
    for name in ("keys", "values"):
        states = [pad(getattr(row, name), (0, 0, widest - row.keys.shape[-2], 0)) for row in rows]
        setattr(layer, name, torch.cat(states))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = longest
    for row in rows:
        row.reset()
    return layer
