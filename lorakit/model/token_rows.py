"""Single trained rows of embeddings and output head (PEFT's trainable tokens), computed beside the frozen weight.

PEFT's forward copies the whole weight with these rows in it, once for the embeddings and once for the head, and its
backward makes the gradient of every row to keep that of a few: 1.2 GB each for 152,000 tokens of width 4,096 in
bfloat16, and as many operations as training the head takes. Here the rows are looked up and multiplied by themselves.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor
from torch.nn.functional import embedding, linear


def token_layers(model: Any) -> list[Any]:
    """PEFT's layers of a model that train single rows, of tied ends both."""
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


def without_input_casts(model: Any, active: bool) -> AbstractContextManager[None]:
    """PEFT's `disable_input_dtype_casting`, which fails at these layers: they lack the switch, and cast no input."""
    for layer in token_layers(model):
        layer.cast_input_dtype_enabled = False
    return disable_input_dtype_casting(model, active)


class TokenRows:
    """The forward of one such layer."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.peft_forward = layer, layer.forward
        self.rows: dict[tuple[str, torch.device], Tensor] = {}
        self.places: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Any:
        layer, names = self.layer, self.layer.active_adapters
        if args or named or layer.disable_adapters or layer.merged or len(names) != 1:
            return self.peft_forward(x, *args, **named)
        base, trained = layer.base_layer, layer.trainable_tokens_delta[names[0]]
        trained = trained.to(base.weight.dtype)
        if isinstance(base, torch.nn.Embedding):
            place = self._place_of(names[0], x.device)[x]
            own, scale = embedding(place.clamp(min=0), trained), layer._get_embed_scale()
            own = own if scale is None else own * scale.to(own.dtype)
            return torch.where((place >= 0)[..., None], own, base(x))
        logits: Tensor = base(x)
        return logits.index_copy_(-1, self._rows(names[0], x.device), linear(x, trained).to(logits.dtype))

    def _rows(self, name: str, device: torch.device) -> Tensor:
        """The rows that an adapter trains."""
        if (name, device) not in self.rows:
            self.rows[name, device] = torch.tensor(self.layer.token_indices[name], device=device)
        return self.rows[name, device]

    def _place_of(self, name: str, device: torch.device) -> Tensor:
        """The place of each token's row among those, -1 of the others (tokens)."""
        if (name, device) not in self.places:
            rows = self._rows(name, device)
            place_of = torch.full((self.layer.base_layer.num_embeddings,), -1, device=device)
            place_of[rows] = torch.arange(len(rows), device=device)
            self.places[name, device] = place_of
        return self.places[name, device]
