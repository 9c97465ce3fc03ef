"""Greedy answers of a model in memory to prompts of token ids, in batches that fit into it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lorakit.distributed.processes import local_size
from lorakit.errors import LorakitError, UserError
from lorakit.hardware.accelerator import free_memory_of
from lorakit.hardware.machine import processor
from lorakit.hardware.memory import OutOfMemory, free_memory, within_memory
from lorakit.model.config_values import positions_of
from lorakit.model.loss import causal_of
from lorakit.progress import Progress

Item = TypeVar("Item")

# The share of free memory that keys and values may take; activations and logits need the rest.
_SHARE = 0.25
_LEAST, _MOST = 1 << 11, 1 << 20
# Prompts generated at once. Decoding is bound by reading the weights, so a wide batch is nearly free, up to here.
_PROMPTS, _PROMPTS_ON_CPU = 256, 64
# A batch of which no more than this share is still being written ends: the rest goes on in a smaller one.
_LIVE = 0.5
# A batch does not end early with fewer rows or after fewer tokens: computing the prompts again costs more.
_WORTHWHILE_ROWS, _WORTHWHILE_TOKENS = 16, 16


def tokens_at_once(model: Any) -> int:
    """How many tokens' keys and values fit at once, with padding, into what is free on the model's device."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = getattr(text, "num_hidden_layers", None) or 1
    stored = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * width * model.dtype.itemsize
    free = free_memory_of(model.device) if model.device.type != "cpu" else processor().memory // local_size()
    return int(min(max(free * _SHARE / stored, _LEAST), _MOST))


def in_batches(
    items: Sequence[Item], size: Callable[[Item], int], rows: int, tokens: int, work: Callable[[list[Item]], list[Item]]
) -> None:
    """Call `work` on batches of items of similar size, the largest first. It returns the items that need more. A batch
    has at most `rows` items and `tokens` tokens (its items times the largest size), but at least one item. Where memory
    runs out, batches from then on are half as large; an error where not even one item fits."""
    waiting = sorted(items, key=size)
    while waiting:
        most = max(1, min(rows, tokens // max(size(waiting[-1]), 1)))
        batch = waiting[-most:]
        left = within_memory(partial(work, batch))
        if isinstance(left, OutOfMemory):
            free_memory()
            if len(batch) == 1:
                raise LorakitError(
                    f"out of memory on one row of {size(batch[0]):,} tokens. Give shorter rows, a smaller "
                    "max_new_tokens, or a machine with more memory."
                )
            rows = len(batch) // 2
            continue
        del waiting[-most:]
        if left:
            waiting = sorted([*waiting, *left], key=size)


class Answer(NamedTuple):
    """The tokens of an answer, without the one that ends it. `ended`: the model ended it, otherwise it was cut.
    `seconds`: its share of the time of its batch, where that was measured."""

    tokens: tuple[int, ...]
    ended: bool
    seconds: float | None = None


@dataclass(eq=False)
class _Draft:
    """A prompt and the tokens generated so far, at most `room`; the last one needs no position. `ended`: by a stop
    token."""

    number: int
    prompt: Sequence[int]
    room: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def extend(self, tokens: Sequence[int], stop_ids: Sequence[int]) -> None:
        """Add tokens up to one that ends the answer, which is not one of its own."""
        for token in tokens[: self.room - len(self.tokens)]:
            if token in stop_ids:
                self.ended = True
                return
            self.tokens.append(token)


def answer_rooms(prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int | None) -> list[int]:
    """The most tokens of the answer to each prompt; the last one needs no position. A UserError if a prompt is longer
    than the `limit` of positions, None for a model that computes any."""
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest > limit:
        what = f"a prompt of {longest:,} tokens is more than the model's {limit:,} positions, each with an embedding"
        raise UserError(f"{what}. Leave longer rows out, or score a model with more positions.")
    return [max_new_tokens if limit is None else min(max_new_tokens, limit + 1 - len(prompt)) for prompt in prompts]


def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad: int,
    label: str,
    progress: Progress,
    done: Callable[[dict[int, Answer]], None] = lambda answers: None,
    generate: Callable[..., torch.Tensor] | None = None,
) -> list[Answer]:
    """The model's greedy answer to each prompt (token ids): always the most likely token. An answer ends at one of
    `stop_ids`, after `max_new_tokens`, or at the model's last position if it has no embeddings for more. The model's
    own generation_config is not used. `done` gets the answers of each batch by the number of their prompt. A UserError
    if a prompt is longer than the model's positions. `generate`: takes the place of the model's own where processes
    make the same passes; batches then do not depend on what memory one of them has."""
    causal = causal_of(model)
    positions = positions_of(causal.config.to_dict())
    limit = positions.limit if positions and positions.hard else None  # of the embeddings of positions
    rooms = answer_rooms(prompts, max_new_tokens, limit)
    drafts = [_Draft(number, prompt, room) for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))]
    answers: dict[int, Answer] = {}

    def work(batch: list[_Draft]) -> list[_Draft]:
        left = _continue(generate or causal.generate, causal.device, batch, stop_ids, limit, pad)
        finished = {}
        for draft in (draft for draft in batch if draft not in left):
            finished[draft.number] = Answer(tuple(draft.tokens), draft.ended)
        answers.update(finished)
        done(finished)
        bar.advance(len(finished))
        return left

    rows = _PROMPTS_ON_CPU if causal.device.type == "cpu" else _PROMPTS
    tokens = sys.maxsize if generate else tokens_at_once(causal)
    own_config, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        with progress.bar(label, total=len(prompts)) as bar:
            in_batches(drafts, lambda one: len(one.prompt) + max_new_tokens, rows, tokens, work)
    finally:
        causal.generation_config = own_config
    return [answers[number] for number in range(len(prompts))]


def _continue(
    generate: Callable[..., torch.Tensor],
    device: torch.device,
    batch: list[_Draft],
    stop_ids: Sequence[int],
    limit: int | None,
    pad: int,
) -> list[_Draft]:
    """Generate more tokens for each prompt of a batch. Returns those that are not finished."""
    rows = [torch.tensor([*draft.prompt, *draft.tokens], dtype=torch.long) for draft in batch]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    longest = ids.shape[1]
    most = max(draft.room - len(draft.tokens) for draft in batch)
    output = generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=most if limit is None else min(most, limit + 1 - longest),
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([_MostAreDone(batch, stop_ids)]),
    )
    for draft, tokens in zip(batch, output[:, longest:].tolist(), strict=True):
        draft.extend(tokens, stop_ids)
    return [draft for draft in batch if len(draft.tokens) < draft.room and not draft.ended]


class _MostAreDone(StoppingCriteria):
    """Ends a batch early when most of its rows are finished, since they would be computed in vain."""

    def __init__(self, batch: list[_Draft], stop_ids: Sequence[int]) -> None:
        self.live = torch.ones(len(batch), dtype=torch.bool)
        self.left = torch.tensor([draft.room - len(draft.tokens) for draft in batch])
        self.stops, self.tokens = torch.tensor(list(stop_ids), dtype=torch.long), 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens += 1
        self.live &= ~torch.isin(input_ids[:, -1].cpu(), self.stops) & (self.tokens < self.left)
        worthwhile = len(self.live) >= _WORTHWHILE_ROWS and self.tokens >= _WORTHWHILE_TOKENS
        over = worthwhile and int(self.live.sum()) <= _LIVE * len(self.live)
        return torch.full((len(self.live),), over, dtype=torch.bool, device=input_ids.device)
