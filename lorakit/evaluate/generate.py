"""Greedy answers: prompts -> token ids and texts, in left-padded batches of similar length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.chat_template.template_probe import compile_alternation
from lorakit.errors import UserError
from lorakit.evaluate.likelihood import in_batches, tokens_at_once
from lorakit.model.positions import positions_of
from lorakit.model.shared_prefix import causal_of
from lorakit.progress import Progress

# Prompts generated at once. Decoding is bound by reading the weights, so a wide batch is nearly free, up to here.
_ROWS = {"cpu": 64, "cuda": 256}
# A batch of which no more than this share is still being written ends: the rest goes on in a smaller one.
_LIVE = 0.5
# A batch does not end early with fewer rows or after fewer tokens: computing the prompts again costs more.
_WORTHWHILE_ROWS, _WORTHWHILE_TOKENS = 16, 16


class Answer(NamedTuple):
    """The tokens of an answer, without the one that ends it. `ended`: the model ended it, otherwise it was cut."""

    tokens: tuple[int, ...]
    ended: bool


@dataclass(eq=False)
class _Draft:
    """A prompt and the tokens generated so far, at most `room`; the last one needs no position."""

    number: int
    prompt: Sequence[int]
    room: int
    tokens: list[int] = field(default_factory=list)

    def ended(self, stop_ids: Sequence[int]) -> bool:
        return any(token in stop_ids for token in self.tokens)


def decode_answer(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of an answer's tokens, without the thought before it and without what the chat template writes before
    every answer (gpt-oss: the name of the channel)."""
    end, front = _around_answers(tokenizer)
    text = str(tokenizer.decode(list(tokens))) if end or front else ""
    _, mark, answer = text.rpartition(end) if end else ("", "", "")
    if not mark and front and text.lstrip().startswith(front):
        mark, answer = front, text.lstrip().removeprefix(front)
    if mark:
        return compile_alternation(frozenset(tokenizer.all_special_tokens)).sub("", answer).lstrip()
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@lru_cache(maxsize=8)
def _around_answers(tokenizer: Any) -> tuple[str, str]:
    """The text between a thought and the answer, and the text before an answer without a thought; empty if there is
    only white space."""
    if not tokenizer.chat_template:
        return "", ""
    template = ChatTemplate(tokenizer)
    return (template.thoughts.after.strip() if template.thoughts else ""), template.frame[0].strip()


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stop_ids, tokens))


def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad: int,
    label: str,
    progress: Progress,
    done: Callable[[dict[int, Answer]], None] = lambda answers: None,
) -> list[Answer]:
    """The model's greedy answer to each prompt (token ids): always the most likely token. An answer ends at one of
    `stop_ids`, after `max_new_tokens`, or at the model's last position if it has no embeddings for more. The model's
    own generation_config is not used. `done` gets the answers of each batch by the number of their prompt. A UserError
    if a prompt is longer than the model's positions."""
    causal = causal_of(model)
    positions = positions_of(causal.config.to_dict())
    limit = positions.limit if positions and positions.hard else None  # of the embeddings of positions
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest > limit:
        what = f"a prompt of {longest:,} tokens is more than the model's {limit:,} positions, each with an embedding"
        raise UserError(f"{what}. Leave longer rows out, or score a model with more positions.")
    rooms = [max_new_tokens if limit is None else min(max_new_tokens, limit + 1 - len(prompt)) for prompt in prompts]
    drafts = [_Draft(number, prompt, room) for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))]
    answers: dict[int, Answer] = {}

    def work(batch: list[_Draft]) -> list[_Draft]:
        left = _continue(causal, batch, stop_ids, limit, pad)
        finished = {}
        for draft in (draft for draft in batch if draft not in left):
            finished[draft.number] = Answer(tuple(until_stop(draft.tokens, stop_ids)), draft.ended(stop_ids))
        answers.update(finished)
        done(finished)
        bar.advance(len(finished))
        return left

    rows = _ROWS.get(causal.device.type, _ROWS["cpu"])
    own_config, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        with torch.inference_mode(), progress.bar(label, total=len(prompts)) as bar:
            in_batches(drafts, lambda one: len(one.prompt) + max_new_tokens, rows, tokens_at_once(causal), work)
    finally:
        causal.generation_config = own_config
    return [answers[number] for number in range(len(prompts))]


def _continue(causal: Any, batch: list[_Draft], stop_ids: Sequence[int], limit: int | None, pad: int) -> list[_Draft]:
    """Generate more tokens for each prompt of a batch. Returns those that are not finished."""
    rows = [torch.tensor([*draft.prompt, *draft.tokens], dtype=torch.long) for draft in batch]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    longest = ids.shape[1]
    most = max(draft.room - len(draft.tokens) for draft in batch)
    output = causal.generate(
        input_ids=ids.to(causal.device),
        attention_mask=mask.to(causal.device),
        max_new_tokens=most if limit is None else min(most, limit + 1 - longest),
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([_MostAreDone(batch, stop_ids)]),
    )
    for draft, tokens in zip(batch, output[:, longest:].tolist(), strict=True):
        draft.tokens += tokens
        del draft.tokens[draft.room :]
    return [draft for draft in batch if len(draft.tokens) < draft.room and not draft.ended(stop_ids)]


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
