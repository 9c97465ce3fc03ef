"""Greedy answers of a model in memory to prompts of token ids, in batches that fit into it."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.functional import pad as pad_last
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lorakit.distributed.processes import local_size
from lorakit.errors import LorakitError, UserError
from lorakit.hardware.accelerator import free_memory_of
from lorakit.hardware.machine import processor
from lorakit.hardware.memory import OutOfMemory, free_memory, keep_freed_memory, within_memory
from lorakit.model.config_values import positions_of
from lorakit.model.kv_cache import StackedRows, can_change_rows, common_start, row_of, start_of
from lorakit.model.loss import causal_of
from lorakit.progress import Progress

Item = TypeVar("Item")

# The share of free memory that keys and values may take; activations and logits need the rest.
_SHARE = 0.25
_LEAST, _MOST = 1 << 11, 1 << 20
# Prompts generated at once. Decoding is bound by reading the weights, so a wide batch is nearly free, up to here.
_PROMPTS, _PROMPTS_ON_CPU = 256, 64
# A batch of which no more than this share is still being written shrinks to the rest. A CPU takes longer for each row.
_LIVE, _LIVE_ON_CPU = 0.5, 0.9
# It does not with fewer rows or after fewer tokens, which would cost more than it saves.
_WORTHWHILE_ROWS, _WORTHWHILE_TOKENS = 4, 16
# Where no more than this share of the rows that it began with is left, they go on later, beside what is left of others.
_FEW = 1 / 4
# On a CPU, prompts of so many tokens are computed one at a time, without padding and what a mask costs. One that has
# this share of its tokens in common with the one before it goes on from there.
_ALONE, _SHARED = 64, 1 / 20
# So few prompts that begin alike are computed in one batch, whatever their lengths.
_ALIKE = 8


def tokens_at_once(model: Any) -> int:
    """How many tokens' keys and values fit at once, with padding, into what is free on the model's device."""
    text = model.config.get_text_config()
    # As a dictionary, since a family whose layers differ (Gemma 4) refuses to name one size; the widest head counts.
    sizes = text.to_dict() | {name: getattr(text, name) for name in text.attribute_map if hasattr(text, name)}
    heads = sizes.get("num_attention_heads") or 1
    widths = [sizes[name] for name in ("head_dim", "global_head_dim") if sizes.get(name)]
    width, layers = max(widths, default=text.hidden_size // heads), sizes.get("num_hidden_layers") or 1
    stored = 2 * layers * (sizes.get("num_key_value_heads") or heads) * width * model.dtype.itemsize
    free = free_memory_of(model.device) if model.device.type != "cpu" else processor().memory // local_size()
    return int(min(max(free * _SHARE / stored, _LEAST), _MOST))


def in_batches(
    items: Sequence[Item], size: Callable[[Item], int], rows: int, tokens: int, work: Callable[[list[Item]], list[Item]]
) -> None:
    """Call `work` on batches of items of similar size, the largest first. It returns the items that need more: they
    wait for others of their kind, until a batch is full or nothing else is left. A batch has at most `rows` items and
    `tokens` tokens (its items times the largest size), but at least one item. Where memory runs out, batches from then
    on are half as large; an error where not even one item fits."""

    def most_of(some: list[Item]) -> int:
        return max(1, min(rows, tokens // max(size(some[-1]), 1)))

    waiting: list[Item] = sorted(items, key=size)
    again: list[Item] = []
    while waiting or again:
        source = again if not waiting or (again and len(again) >= most_of(again)) else waiting
        most = most_of(source)
        batch = source[-most:]
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
        del source[-most:]
        again = sorted([*again, *left], key=size)


class Answer(NamedTuple):
    """The tokens of an answer, without the one that ends it. `ended`: the model ended it, otherwise it was cut.
    `seconds`: its share of the time of its batch, where that was measured."""

    tokens: tuple[int, ...]
    ended: bool
    seconds: float | None = None


@dataclass(frozen=True)
class Stops:
    """What ends an answer: tokens of `ids`, and `texts` wherever they come in what is written, which are kept."""

    ids: Sequence[int]
    texts: Sequence[str] = ()
    tokenizer: Any = None

    def in_texts(self, answers: Sequence[Sequence[int]], new: int) -> list[bool]:
        """Whether a text ends in one of the last `new` tokens of each answer."""
        if not self.texts:
            return [False] * len(answers)
        # A token may be one byte.
        window = new + max(len(text.encode()) for text in self.texts)
        written = self.tokenizer.batch_decode([answer[-window:] for answer in answers])
        return [any(text in one for text in self.texts) for one in written]


@dataclass(eq=False)
class _Draft:
    """A prompt and the tokens generated so far, at most `room`; the last one needs no position. `width`: the length by
    which it is put into a batch. `ended`: by a stop token or text. `cache`: the keys and values of all but the last
    token, where they were kept."""

    number: int
    prompt: Sequence[int]
    room: int
    width: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    cache: Any = None

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.tokens]

    def extend(self, tokens: Sequence[int], stops: Stops) -> None:
        """Add tokens up to one that ends the answer, which is not one of its own."""
        before = len(self.tokens)
        for token in tokens[: self.room - before]:
            if token in stops.ids:
                self.ended = True
                break
            self.tokens.append(token)
        self.ended |= any(stops.in_texts([self.tokens], len(self.tokens) - before))

    @property
    def live(self) -> bool:
        return len(self.tokens) < self.room and not self.ended


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
    generate: Callable[..., Any] | None = None,
    stop_texts: Sequence[str] = (),
    tokenizer: Any = None,
) -> list[Answer]:
    """The model's greedy answer to each prompt (token ids): always the most likely token. An answer ends at one of
    `stop_ids`, after `max_new_tokens`, or at the model's last position if it has no embeddings for more. The model's
    own generation_config is not used. `done` gets the answers of each batch by the number of their prompt. A UserError
    if a prompt is longer than the model's positions. `generate`: takes the place of the model's own where processes
    make the same passes; batches then do not depend on what memory one of them has. `stop_texts`: end an answer too,
    which has them and may have more; the `tokenizer` reads them."""
    causal = causal_of(model)
    positions = positions_of(causal.config.to_dict())
    limit = positions.limit if positions and positions.hard else None  # of the embeddings of positions
    rooms, on_cpu = answer_rooms(prompts, max_new_tokens, limit), causal.device.type == "cpu"
    widths = _widths(prompts) if on_cpu else dict(enumerate(map(len, prompts)))
    drafts = [_Draft(number, prompts[number], rooms[number], width) for number, width in widths.items()]
    answers: dict[int, Answer] = {}
    stops = Stops(stop_ids, stop_texts, tokenizer)

    def work(batch: list[_Draft]) -> list[_Draft]:
        _continue(generate or causal.generate, causal.device, batch, stops, limit, pad)
        left = [draft for draft in batch if draft.live]
        finished = {}
        for draft in (draft for draft in batch if draft not in left):
            finished[draft.number] = Answer(tuple(draft.tokens), draft.ended)
        answers.update(finished)
        done(finished)
        bar.advance(len(finished))
        return left

    rows = _PROMPTS_ON_CPU if on_cpu else _PROMPTS
    tokens = sys.maxsize if generate else tokens_at_once(causal)
    own_config, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        keeping = keep_freed_memory() if on_cpu else nullcontext()
        with keeping, progress.bar(label, total=len(prompts)) as bar:
            in_batches(drafts, lambda one: one.width + max_new_tokens, rows, tokens, work)
    finally:
        causal.generation_config = own_config
    return [answers[number] for number in range(len(prompts))]


def _widths(prompts: Sequence[Sequence[int]]) -> dict[int, int]:
    """By its number each prompt's length, or the longest one's of a few that begin alike beyond what all begin with:
    those of one width come one after another."""
    order = sorted(range(len(prompts)), key=lambda number: list(prompts[number]))
    of_all = common_start(prompts[order[0]], prompts[order[-1]]) if order else 0
    groups: list[list[int]] = []
    for place, number in enumerate(order):
        prompt = prompts[number]
        alike = common_start(prompts[order[place - 1]], prompt) - of_all if groups and len(prompt) >= _ALONE else 0
        if alike and alike >= _SHARED * len(prompt):
            groups[-1].append(number)
        else:
            groups.append([number])
    return {
        number: max(len(prompts[one]) for one in group) if len(group) <= _ALIKE else len(prompts[number])
        for group in groups
        for number in group
    }


def _continue(
    generate: Callable[..., Any], device: torch.device, batch: list[_Draft], stops: Stops, limit: int | None, pad: int
) -> None:
    """Generate more tokens for each prompt of a batch, all that most of them need."""
    given = {"do_sample": False, "use_cache": True, "eos_token_id": list(stops.ids) or None, "pad_token_id": pad}
    given["return_dict_in_generate"] = True
    on_cpu = device.type == "cpu"
    alone = on_cpu and any(draft.cache is not None or len(draft.ids) >= _ALONE for draft in batch)
    live, cache = _one_at_a_time(partial(generate, **given), batch, stops) if alone else (batch, None)
    if not live:
        return
    rows = [torch.tensor(draft.ids, dtype=torch.long) for draft in live]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(device)
    while live:
        longest = ids.shape[1]
        most = max(draft.room - len(draft.tokens) for draft in live)
        output = generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=most if limit is None else min(most, limit + 1 - longest),
            stopping_criteria=StoppingCriteriaList([_MostAreDone(live, stops, _LIVE_ON_CPU if on_cpu else _LIVE)]),
            **given,
        )
        for draft, tokens in zip(live, output.sequences[:, longest:].tolist(), strict=True):
            draft.extend(tokens, stops)
        left = [number for number, draft in enumerate(live) if draft.live]
        cache = output.past_key_values
        if not can_change_rows(cache):
            return
        if len(left) <= _FEW * len(batch):
            for number in left if alone else ():
                live[number].cache = row_of(cache, number, len(live[number].ids) - 1)
            return
        # The rest goes on from its keys and values: computing the prompts again would cost more than many tokens. Those
        # from the end fill the gaps, so that few are moved.
        last = iter(left[::-1])
        order = [number if live[number].live else next(last) for number in range(len(left))]
        chosen = torch.tensor(order, device=device)
        cache.batch_select_indices(chosen)
        ids = output.sequences[chosen]
        mask = pad_last(mask[chosen], (0, ids.shape[1] - longest), value=1)
        live = [live[number] for number in order]


def _one_at_a_time(generate: Callable[..., Any], batch: list[_Draft], stops: Stops) -> tuple[list[_Draft], Any]:
    """The drafts of a batch that are still written, and their keys and values, but for the last token of each; None
    where the model's kind cannot be put together. Each is computed without padding, and what begins like the one before
    it from there on; those that go on from another batch have theirs."""
    before: list[int] = []
    cache, live = None, []
    rows = StackedRows(len(batch), max(len(draft.ids) for draft in batch))
    for draft in sorted(batch, key=lambda draft: draft.ids):
        own, draft.cache = draft.cache, None
        if own is None:
            ids = draft.ids
            shared = common_start(before, ids[:-1])
            start = start_of(cache, shared) if shared >= max(_SHARED * len(ids), 1) else None
            row = torch.tensor([ids], dtype=torch.long)
            output = generate(
                input_ids=row, attention_mask=torch.ones_like(row), past_key_values=start, max_new_tokens=1
            )
            before, own = ids, output.past_key_values
            if not can_change_rows(own):
                return batch, None
            draft.extend(output.sequences[0, len(ids) :].tolist(), stops)
            cache = own
        if draft.live:
            rows.add(own)
            live.append(draft)
    return live, rows.whole() if live else None


class _MostAreDone(StoppingCriteria):
    """Ends a batch early when most of its rows are finished, since they would be computed in vain."""

    def __init__(self, batch: list[_Draft], stops: Stops, share: float) -> None:
        self.batch, self.stops, self.share = batch, stops, share
        self.live = torch.ones(len(batch), dtype=torch.bool)
        self.left = torch.tensor([draft.room - len(draft.tokens) for draft in batch])
        self.ids, self.tokens = torch.tensor(list(stops.ids), dtype=torch.long), 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens += 1
        self.live &= ~torch.isin(input_ids[:, -1].cpu(), self.ids) & (self.tokens < self.left)
        if self.stops.texts:
            numbers = self.live.nonzero()[:, 0].tolist()
            written = [[*self.batch[at].tokens, *input_ids[at, -self.tokens :].tolist()] for at in numbers]
            self.live[numbers] = ~torch.tensor(self.stops.in_texts(written, 1), dtype=torch.bool)
        worthwhile = len(self.live) >= _WORTHWHILE_ROWS and self.tokens >= _WORTHWHILE_TOKENS
        over = not self.live.any() or (worthwhile and int(self.live.sum()) <= self.share * len(self.live))
        return torch.full((len(self.live),), over, dtype=torch.bool, device=input_ids.device)
