"""EVA: A starts as the main directions of what reaches each module on the rows, B at zero."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from torch.nn.utils.rnn import pad_sequence

from lorakit.errors import LorakitError, UserError
from lorakit.model.adapters import Eva, InitContext
from lorakit.model.adapters.weight_init import lora_layers
from lorakit.model.shared_prefix import IGNORED, body_of
from lorakit.progress import Bar

_LONGEST_PASS = 500
_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def init_eva(model: Any, settings: Eva, context: InitContext) -> None:
    """Find the directions on training batches until they no longer change, and give each module its rank. UserError
    where the rows have fewer trained tokens than directions are asked for, or a module has fewer inputs. LorakitError
    where the directions do not settle."""
    config, rho = model.peft_config["default"], settings.rho
    most = round(config.r * rho)
    least, narrow = min((layer.in_features, name) for name, layer in lora_layers(model))
    if most > least:
        reason = f"{config.r} times rho {rho:g} is {most}, and {narrow} has {least} inputs"
        raise UserError(f"adapter.rank: {reason}. Write a smaller rank, or kind: {{eva: {{rho: 1}}}}.")
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=rho, tau=settings.converged)
    body, shape = body_of(model.get_base_model()), [0, 0]

    def forward(_: Any, inputs: dict[str, Any]) -> None:
        shape[:] = inputs["input_ids"].shape
        body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def reaching(inputs: Any, positions: torch.Tensor, name: str) -> torch.Tensor:
        """What reaches a module at the trained positions; some families hand over (rows * tokens, width)."""
        reached = inputs[0] if isinstance(inputs, tuple) else inputs
        seen, tokens = reached.shape[:-1].numel(), shape[0] * shape[1]
        if seen != tokens:
            reason = f"eva cannot tell which tokens reach {name}: it sees {seen} of {tokens}"
            raise UserError(f"adapter.kind: {reason}. Leave it out with adapter.exclude.")
        return reached.reshape(*shape, -1)[positions.T.unbind()]

    with context.progress.bar("eva: directions of the inputs", total=0) as bar:
        batches = _Batches(context, 2 * most, next(model.parameters()).device, bar)
        functions = {"forward_fn": forward, "prepare_layer_inputs_fn": reaching}
        initialize_lora_eva_weights(model, batches, show_progress_bar=False, **functions)
    config.init_lora_weights, config.eva_config = True, None
    ranks = [layer.r["default"] for _, layer in lora_layers(model)]
    spread = f"ranks from {min(ranks)} to {max(ranks)} in {len(ranks)} modules"
    context.progress.say(f"eva: directions found on {batches.used} batches; {spread}")


class _Batches:
    """Training batches joined until each has enough trained tokens. PEFT asks for the first one twice."""

    def __init__(self, context: InitContext, tokens: int, device: torch.device, bar: Bar) -> None:
        self.context, self.tokens, self.device, self.bar, self.used = context, tokens, device, bar, 0

    def __len__(self) -> int:
        return 1  # PEFT asks only whether there is one

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting: list[dict[str, Any]] = []
        tokens = 0
        for batch in self.context.batches():
            waiting.append(batch)
            tokens += int((batch["labels"] != IGNORED).sum())
            if tokens >= self.tokens:
                self.used += 1
                self.bar.advance(1)
                if self.used > _LONGEST_PASS:
                    remedy = "Write a smaller rank, or a smaller `converged`."
                    raise LorakitError(f"eva: its directions have not settled after {_LONGEST_PASS} batches. {remedy}")
                rows = {key: [row for joined in waiting for row in joined[key]] for key in _PADDING}
                yield {key: pad_sequence(rows[key], True, _PADDING[key]).to(self.device) for key in _PADDING}
                waiting, tokens = [], 0
        if self.used == 0:
            reason = f"eva needs at least {self.tokens} trained tokens to find its directions, the rows have {tokens}"
            raise UserError(f"adapter.kind: {reason}. Write a smaller rank, or another kind.")
