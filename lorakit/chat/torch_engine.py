"""Tokens from a model in torch, by transformers' own generation, each as it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from lorakit.chat.models import Decoding
from lorakit.evaluate.inference import ModelLoader
from lorakit.evaluate.models import EvalModelSpec
from lorakit.hardware.accelerator import restoring_random_states
from lorakit.model.block_code import use_inference_code
from lorakit.model.loss import causal_of


class _TokenStreamer(BaseStreamer):
    """Hands on each generated token; `generate` gives it the prompt first."""

    def __init__(self, receive: Callable[[int], None]) -> None:
        self._receive, self._is_prompt = receive, True

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._receive(token)

    def end(self) -> None:
        self._is_prompt = True


@dataclass(frozen=True, eq=False)
class TorchEngine:
    """A model on the base that `loader` keeps in memory. Models of one loader share it, one after the other."""

    spec: EvalModelSpec
    loader: ModelLoader
    pad: int

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
        """As the greedy answers of `lorakit eval` (model/generation.py), or drawn from the whole distribution."""
        model = self.loader.model_of(self.spec)
        causal = causal_of(model)
        ids = torch.tensor([prompt], dtype=torch.long, device=causal.device)
        drawn = decoding.temperature > 0
        chosen: dict[str, Any] = {"do_sample": drawn}
        if drawn:  # generate's own defaults of top_k and top_p cut the distribution
            chosen |= {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        own_config, causal.generation_config = causal.generation_config, GenerationConfig()
        try:
            with torch.inference_mode(), use_inference_code(model), restoring_random_states(causal.device):
                torch.manual_seed(decoding.seed)
                causal.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=most,
                    use_cache=True,
                    eos_token_id=list(stop_ids) or None,
                    pad_token_id=self.pad,
                    streamer=_TokenStreamer(receive),
                    **chosen,
                )
        finally:
            causal.generation_config = own_config
