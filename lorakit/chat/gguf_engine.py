"""Tokens from a GGUF file, by llama.cpp, each as it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.chat.models import Decoding
from lorakit.evaluate.inference import ModelLoader
from lorakit.evaluate.models import EvalModelSpec
from lorakit.model.llama_cpp import Token

_AT_ONCE = 256
"""Tokens of a prompt that are computed before Ctrl-C is looked for."""


@dataclass(frozen=True, eq=False)
class GgufEngine:
    """A GGUF file that `loader` keeps open."""

    spec: EvalModelSpec
    loader: ModelLoader

    def load(self) -> None:
        self.loader.model_of(self.spec)

    def generate(
        self,
        prompt: list[int],
        stop_ids: Sequence[int],
        most: int,
        decoding: Decoding,
        receive: Callable[[int], None],
    ) -> None:
        """As the greedy answers of `lorakit eval` (evaluate/llama_cpp_forward.py), or drawn from the whole
        distribution."""
        model = self.loader.model_of(self.spec)
        model.reserve(len(prompt) + most, 1)
        model.forget()
        generator = np.random.default_rng(decoding.seed)
        tokens = [Token(0, at, token, at == len(prompt) - 1) for at, token in enumerate(prompt)]
        for start in range(0, len(tokens) - 1, _AT_ONCE):
            model.decode(tokens[start : min(start + _AT_ONCE, len(tokens) - 1)])
        last = tokens[-1]
        for position in range(len(prompt), len(prompt) + most):
            if decoding.temperature > 0:
                token = _draw(model.decode([last])[0], decoding.temperature, generator)
            else:
                token = model.decode_greedily([last])[0]
            receive(token)
            if token in stop_ids:
                return
            last = Token(0, position, token, True)


def _draw(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    """A token drawn by its probability at a temperature; `logits` (vocabulary,)."""
    scaled = logits.astype(np.float64) / temperature
    sums = np.exp(scaled - scaled.max()).cumsum()
    return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
