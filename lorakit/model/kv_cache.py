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

    @classmethod
    def of_room(cls, rooms: list[Tensor], used: int) -> "RoomyLayer":
        """A layer in this room for keys and for values (rows, heads, tokens, width), of whose tokens `used` are
        there."""
        layer = cls()
        layer.lazy_initialization(*rooms)
        layer._room = rooms
        layer.keys, layer.values = layer._seen = [room[..., :used, :] for room in rooms]
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states (rows, heads, new tokens, width); returns all keys and values, views of the room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        length = used + key_states.shape[-2]
        # Other tensors than the views that were handed out: rows were dropped, or tokens.
        moved = self.keys is not self._seen[0] or self.values is not self._seen[1]
        if not self._room or moved or length > self._room[0].shape[-2]:
            size = _with_room(length)
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


class StackedRows:
    """One cache for a batch, padded on the left, made of the caches of its rows one after another. Keys and values are
    copied into their room at once, so that those of a row can go before the next row's come.

    `most`: how many rows may come. `longest`: how many tokens one may have."""

    def __init__(self, most: int, longest: int) -> None:
        self._most, self._longest = most, longest
        self._caches: list[Any] = []  # without the layers whose states are in a room
        self._rooms: dict[int, list[Tensor]] = {}  # by layer, of keys and of values
        self._lengths: list[int] = []

    def add(self, cache: Any) -> None:
        """Add a cache of one row, which stays as it is."""
        row, length = len(self._caches), cache.get_seq_length()
        rest = copy.copy(cache)
        rest.layers = list(cache.layers)
        for at, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer or not layer.is_initialized:
                continue
            states = (layer.keys, layer.values)
            if at not in self._rooms:
                self._rooms[at] = [_room_for(one, self._most, self._longest) for one in states]
            for room, one in zip(self._rooms[at], states, strict=True):
                room[row, :, : self._longest - length] = 0
                room[row, :, self._longest - length : self._longest] = one[0]
            rest.layers[at] = None
        self._caches.append(rest)
        self._lengths.append(length)

    def whole(self) -> Any:
        """The cache of all rows added, as long as the longest of them."""
        longest, whole = max(self._lengths), self._caches[0]
        for at in range(len(whole.layers)):
            if at in self._rooms:
                rooms = [room[: len(self._caches), :, self._longest - longest :] for room in self._rooms[at]]
                whole.layers[at] = RoomyLayer.of_room(rooms, longest)
            else:
                whole.layers[at] = _stacked_layers([cache.layers[at] for cache in self._caches], longest)
        return whole


def _room_for(states: Tensor, rows: int, longest: int) -> Tensor:
    return states.new_empty((rows, *states.shape[1:-2], _with_room(longest), states.shape[-1]))


def _with_room(length: int) -> int:
    return length + max(_LEAST_ROOM, int(length * _GROWTH))


def _stacked_layers(rows: Sequence[Any], longest: int) -> Any:
    if not rows[0].is_initialized:
        return rows[0]  # of a layer that attends to the keys and values of another one
    layer = copy.copy(rows[0])
    widest = max(row.keys.shape[-2] for row in rows)
    for name in ("keys", "values"):
        states = [pad(getattr(row, name), (0, 0, widest - row.keys.shape[-2], 0)) for row in rows]
        setattr(layer, name, torch.cat(states))
    layer.cumulative_length = longest
    return layer
