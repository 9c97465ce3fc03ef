"""Greedy answers: prompts -> token ids and texts, in left-padded batches of like length."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.chat_template.template_probe import compile_alternation
from lorakit.errors import UserError
from lorakit.evaluate.batching import in_batches, tokens_at_once
from lorakit.model.positions import learned_positions
from lorakit.progress import Progress

# Prompts generated at once. Decoding is bound by reading the weights, so a wide batch is nearly free, up to here.
_ROWS = {"cpu": 64, "cuda": 256}
# A batch of which no more than this share is still being written ends: the rest goes on in a smaller one.
_LIVE = 0.5
# A smaller batch is not begun anew for fewer rows or after fewer tokens: computing the prompts again costs more.
_WORTHWHILE_ROWS, _WORTHWHILE_TOKENS = 16, 16


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, without the one that ends it. `ended`: the model ended it, else it was cut."""

    tokens: tuple[int, ...]
    ended: bool


Done = Callable[[dict[int, Answer]], None]
"""What is told of a batch: its finished answers by the number of their prompt."""


@dataclass(eq=False)
class _Open:
    """A prompt, and what has been said to it so far."""

    number: int
    prompt: Sequence[int]
    room: int
    """The most tokens that may be said: what was asked for, or up to the model's last position."""
    said: list[int] = field(default_factory=list)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad_token_id: int,
    label: str,
    progress: Progress,
) -> list[str]:
    """The model's greedy answer to each prompt (token ids), as text without the token that ends it."""
    found = greedy_answers(model, prompts, stop_ids, max_new_tokens, pad_token_id, label, progress)
    return [text_of(answer, tokenizer) for answer in found]


def text_of(answer: Answer, tokenizer: Any) -> str:
    """An answer as text."""
    return decode_answer(answer.tokens, tokenizer)


def decode_answer(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of an answer's tokens: without the thought before it, and without what the chat template writes in front
    of every answer behind the prompt (gpt-oss: the name of the channel)."""
    end, front = _around_answers(tokenizer)
    if end or front:
        text = str(tokenizer.decode(list(tokens)))
        _, thought, said = text.rpartition(end) if end else ("", "", "")
        if not thought and front and text.lstrip().startswith(front):
            thought, said = front, text.lstrip().removeprefix(front)
        if thought:
            return compile_alternation(frozenset(tokenizer.all_special_tokens)).sub("", said).lstrip()
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@lru_cache(maxsize=8)
def _around_answers(tokenizer: Any) -> tuple[str, str]:
    """What stands between a thought and the answer, and what stands in front of an answer without one; empty where
    there is nothing but white space."""
    if not tokenizer.chat_template:
        return "", ""
    template = ChatTemplate(tokenizer)
    return (template.thoughts.after.strip() if template.thoughts else ""), template.frame[0].strip()


def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad: int,
    label: str,
    progress: Progress,
    done: Done | None = None,
) -> list[Answer]:
    """The model's greedy answer to each prompt (token ids), the likeliest token each time and nothing else.

    An answer ends at one of `stop_ids`, after `max_new_tokens`, or at the model's last position where it has no
    embeddings for more. What the model's own generation_config asks for
    (sampling, penalties) does not hold.

    Raises:
        UserError: a prompt is longer than the model's positions.
        LorakitError: a prompt does not fit into memory.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    limit = learned_positions(causal)
    waiting = [_Open(number, prompt, _room(prompt, max_new_tokens, limit)) for number, prompt in enumerate(prompts)]
    found: dict[int, Answer] = {}
    with torch.inference_mode(), progress.bar(label, total=len(prompts)) as bar, _plain_generation(causal):

        def work(batch: list[_Open]) -> list[_Open]:
            left = _continued(causal, batch, stop_ids, limit, pad)
            finished = {one.number: _answer(one, stop_ids) for one in batch if one not in left}
            found.update(finished)
            if done:
                done(finished)
            bar.advance(len(finished))
            return left

        rows = _ROWS.get(causal.device.type, _ROWS["cpu"])
        in_batches(waiting, lambda one: len(one.prompt) + max_new_tokens, rows, tokens_at_once(causal), work)
    return [found[number] for number in range(len(prompts))]


def _room(prompt: Sequence[int], max_new_tokens: int, limit: int | None) -> int:
    """How many tokens may follow a prompt; the last one that is said needs no position of its own."""
    if limit is None:
        return max_new_tokens
    if len(prompt) > limit:
        raise UserError(
            f"a prompt of {len(prompt):,} tokens is more than the model's {limit:,} positions, each with an embedding "
            "of its own. Leave longer rows out, or score a model with more positions."
        )
    return min(max_new_tokens, limit + 1 - len(prompt))


def _continued(causal: Any, batch: list[_Open], stop_ids: Sequence[int], limit: int | None, pad: int) -> list[_Open]:
    """Say more to each prompt of a batch; those that are not at their end yet."""
    ids, mask = _left_padded([[*one.prompt, *one.said] for one in batch], pad)
    most = max(one.room - len(one.said) for one in batch)
    output = causal.generate(
        input_ids=ids.to(causal.device),
        attention_mask=mask.to(causal.device),
        max_new_tokens=most if limit is None else min(most, limit + 1 - ids.shape[1]),
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([_MostAreDone(batch, stop_ids)]),
    )
    for one, tokens in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
        one.said += tokens
        del one.said[one.room :]
    return [one for one in batch if len(one.said) < one.room and not _ends(one.said, stop_ids)]


class _MostAreDone(StoppingCriteria):
    """Ends a batch early when most of its rows are at their end, which would be computed on in vain."""

    def __init__(self, batch: list[_Open], stop_ids: Sequence[int]) -> None:
        self.live = torch.ones(len(batch), dtype=torch.bool)
        self.left = torch.tensor([one.room - len(one.said) for one in batch])
        self.stops, self.tokens = torch.tensor(list(stop_ids), dtype=torch.long), 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens += 1
        self.live &= ~torch.isin(input_ids[:, -1].cpu(), self.stops) & (self.tokens < self.left)
        worthwhile = len(self.live) >= _WORTHWHILE_ROWS and self.tokens >= _WORTHWHILE_TOKENS
        over = worthwhile and int(self.live.sum()) <= _LIVE * len(self.live)
        return torch.full((len(self.live),), over, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _plain_generation(causal: Any) -> Iterator[None]:
    """Within this, generating asks nothing of the model's own generation_config."""
    own = causal.generation_config
    causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = own


def _answer(one: _Open, stop_ids: Sequence[int]) -> Answer:
    return Answer(tuple(until_stop(one.said, stop_ids)), _ends(one.said, stop_ids))


def _ends(tokens: Sequence[int], stop_ids: Sequence[int]) -> bool:
    return any(token in stop_ids for token in tokens)


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def _left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
