"""Greedy answers: prompts -> texts, in batches of like length."""

from collections.abc import Sequence
from typing import Any

import torch

from lorakit.progress import Progress

# Prompts generated at once. Decoding is bound by reading the weights, so a wide batch is nearly free.
_ROWS = 64


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    pad_token_id: int,
    label: str,
    progress: Progress,
) -> list[str]:
    """The model's greedy answer to each prompt (token ids), as text without the token that ends it.

    An answer ends at one of `stop_ids`, or after `max_new_tokens`.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with torch.inference_mode(), progress.bar(label, total=len(prompts)) as bar:
        for start in range(0, len(order), _ROWS):
            chosen = order[start : start + _ROWS]
            ids, mask = _left_padded([prompts[index] for index in chosen], pad_token_id)
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=stop_ids or None,
                pad_token_id=pad_token_id,
            )
            for index, tokens in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[index] = tokenizer.decode(until_stop(tokens, stop_ids), skip_special_tokens=True)
            bar.advance(len(chosen))
    return answers


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def _left_padded(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
