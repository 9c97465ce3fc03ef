"""Forward passes in batches that fit into memory: losses of rows, log-probabilities of labels, greedy answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lorakit.data.batches import collate
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.chat_template.template_probe import compile_alternation
from lorakit.data.rows import IGNORED
from lorakit.distributed.processes import local_size
from lorakit.errors import LorakitError, UserError
from lorakit.hardware.accelerator import free_memory_of
from lorakit.hardware.machine import processor
from lorakit.hardware.memory import OutOfMemory, free_memory, within_memory
from lorakit.model.config_values import positions_of
from lorakit.model.loss import causal_of, head_logits, trained_states
from lorakit.progress import Progress

Item = TypeVar("Item")

# The share of free memory that keys and values may take; activations and logits need the rest.
_SHARE = 0.25
_LEAST, _MOST = 1 << 11, 1 << 20
# Rows in a batch; of labels also more, up to so many tokens with padding; and logits held at once (128 MiB in float32).
_ROWS, _TOKENS, _LOGITS = 8, 4096, 1 << 25
BROKEN = "Its weights are broken."
# Prompts generated at once. Decoding is bound by reading the weights, so a wide batch is nearly free, up to here.
_PROMPTS, _PROMPTS_ON_CPU = 256, 64
# A batch of which no more than this share is still being written ends: the rest goes on in a smaller one.
_LIVE = 0.5
# A batch does not end early with fewer rows or after fewer tokens: computing the prompts again costs more.
_WORTHWHILE_ROWS, _WORTHWHILE_TOKENS = 16, 16


def trained_tokens(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """How many tokens of each row are predicted and counted (rows,)."""
    return np.array([sum(label != IGNORED for label in row["labels"][1:]) for row in rows], dtype=float)


def row_losses(
    model: Any,
    rows: Sequence[dict[str, Any]],
    pad: int,
    label: str,
    progress: Progress,
    done: Callable[[dict[int, float]], None] = lambda losses: None,
) -> np.ndarray:
    """The summed cross-entropy (rows,) in nats over the trained tokens of each row, in float32; an error if it is NaN.
    `done` gets the losses of each batch by the number of their row."""
    causal = causal_of(model)
    nats = np.zeros(len(rows))
    with torch.inference_mode(), progress.bar(label, total=len(rows)) as bar:

        def work(batch: list[int]) -> list[int]:
            losses = np.zeros(len(batch))
            for start, logits, targets, row_of in _trained_logits(causal, [rows[index] for index in batch], pad):
                here = slice(start, start + len(logits))
                loss = logits.logsumexp(-1) - logits.gather(-1, targets[here, None])[:, 0]
                np.add.at(losses, row_of[here], loss.cpu().double().numpy())
            if not np.isfinite(losses).all():
                raise LorakitError(f"{label}: {losses.sum()}: this model gives no numbers on the rows. {BROKEN}")
            nats[batch] = losses
            done(dict(zip(batch, losses.tolist(), strict=True)))
            bar.advance(len(batch))
            return []

        in_batches(range(len(rows)), lambda index: len(rows[index]["input_ids"]), _ROWS, tokens_at_once(causal), work)
    return nats


def _trained_logits(
    causal: Any, rows: list[dict[str, Any]], pad: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, np.ndarray]]:
    """The logits in float32 that predict the trained tokens, a chunk at a time, each with the number of its first
    token; the id of each trained token (tokens,), and its row (tokens,)."""
    tensors = {key: value.to(causal.device) for key, value in collate(rows, pad).items()}
    output, hidden, targets, row_of = trained_states(causal, **tensors)
    chunk = max(1, _LOGITS // causal.config.get_text_config().vocab_size)
    for start in range(0, len(hidden), chunk):
        logits = head_logits(causal, output, hidden[start : start + chunk]).float()
        yield start, logits, targets, row_of.cpu().numpy()


@dataclass(frozen=True)
class LabelPath:
    """The tokens of a label, and which log-probabilities along them count: `reads` are position, token, label."""

    tokens: tuple[int, ...]
    reads: tuple[tuple[int, int, int], ...]


def label_loglikelihoods(
    model: Any,
    prompts: Sequence[list[int]],
    labels: Sequence[Sequence[int]],
    pad: int,
    progress: Progress,
    note: str = "labels",
) -> np.ndarray:
    """The log-probability of each label after each prompt (prompts, labels), in nats, summed over the label's tokens.
    Labels of one token are all read off one row per prompt. With longer ones a batch has the rows of one prompt, whose
    common beginning is computed once (lorakit.model.loss)."""
    if not labels or not all(labels) or not all(prompts):
        raise UserError("classification: a label or a prompt has no tokens. Write labels and prompts with some text.")
    causal = causal_of(model)
    paths = label_paths([tuple(label) for label in labels])
    scores = np.zeros((len(prompts), len(labels)))
    with torch.inference_mode(), progress.bar(note, total=len(prompts)) as bar:
        for batch in _batches([len(prompt) for prompt in prompts], paths):
            _add_scores(causal, prompts, paths, batch, pad, scores)
            bar.advance(len({prompt for prompt, path in batch if path == 0}))
    if not np.isfinite(scores).all():
        raise LorakitError(f"{note}: this model gives no numbers for the labels. {BROKEN}")
    return scores


def label_paths(labels: Sequence[tuple[int, ...]]) -> list[LabelPath]:
    """The fewest paths that pass every token of every label: labels that differ in the last token share one."""
    stems = sorted(dict.fromkeys(label[:-1] for label in labels), key=len, reverse=True)
    leaves: list[tuple[int, ...]] = []
    for stem in stems:
        if not any(leaf[: len(stem)] == stem for leaf in leaves):
            leaves.append(stem)
    reads: list[list[tuple[int, int, int]]] = [[] for _ in leaves]
    for number, label in enumerate(labels):
        for position, token in enumerate(label):
            passed = next(index for index, leaf in enumerate(leaves) if leaf[:position] == label[:position])
            reads[passed].append((position, token, number))
    # The last token is there only so that the state before it predicts something: any label of this stem will do.
    whole = {label[:-1]: label for label in labels}
    return [LabelPath(whole[leaf], tuple(read)) for leaf, read in zip(leaves, reads, strict=True)]


def _batches(lengths: Sequence[int], paths: Sequence[LabelPath]) -> Iterator[list[tuple[int, int]]]:
    """Batches of (prompt, path): the paths of one prompt, or prompts of similar length if there is only one path."""
    order = sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt])
    longest = max(len(path.tokens) for path in paths)
    for group in [order] if len(paths) == 1 else [[prompt] for prompt in order]:
        pairs = [(prompt, path) for prompt in group for path in range(len(paths))]
        while pairs:
            rows = max(_ROWS, _TOKENS // (lengths[pairs[0][0]] + longest))
            yield pairs[:rows]
            pairs = pairs[rows:]


def _add_scores(
    causal: Any,
    prompts: Sequence[list[int]],
    paths: Sequence[LabelPath],
    batch: Sequence[tuple[int, int]],
    pad: int,
    scores: np.ndarray,
) -> None:
    """Add the log-probabilities of one batch to those of its prompts and labels."""
    rows, reads, start = [], [], 0
    for prompt, number in batch:
        path, before = paths[number], prompts[prompt]
        rows.append({"input_ids": [*before, *path.tokens], "labels": [IGNORED] * len(before) + list(path.tokens)})
        reads += [(start + position, token, prompt, label) for position, token, label in path.reads]
        start += len(path.tokens)
    states, tokens, of_prompt, of_label = np.array(reads).T
    logprobs = np.empty(len(reads))
    for start, logits, _, _ in _trained_logits(causal, rows, pad):
        here = (states >= start) & (states < start + len(logits))
        places = torch.from_numpy(states[here] - start).to(logits.device)
        chosen = logits[places, torch.from_numpy(tokens[here]).to(logits.device)]
        logprobs[here] = (chosen - logits.logsumexp(-1)[places]).cpu().double().numpy()
    np.add.at(scores, (of_prompt, of_label), logprobs)


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
                    "--max-new-tokens, or a machine with more memory."
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
    text = str(tokenizer.decode(list(tokens))) if any(_around_answers(tokenizer)) else ""
    answer = after_thought(text, tokenizer)
    if answer is not None:
        return compile_alternation(frozenset(tokenizer.all_special_tokens)).sub("", answer).lstrip()
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def after_thought(text: str, tokenizer: Any) -> str | None:
    """What follows the thought, or what the chat template writes before every answer; None of a text without either."""
    end, front = _around_answers(tokenizer)
    _, mark, answer = text.rpartition(end) if end else ("", "", "")
    if not mark and front and text.lstrip().startswith(front):
        mark, answer = front, text.lstrip().removeprefix(front)
    return answer if mark else None


@lru_cache(maxsize=8)
def _around_answers(tokenizer: Any) -> tuple[str, str]:
    """The text between a thought and the answer, and that before an answer without one; empty if it is white space."""
    if not tokenizer.chat_template:
        return "", ""
    template = ChatTemplate(tokenizer)
    return (template.thoughts.after.strip() if template.thoughts else ""), template.frame[0].strip()


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stop_ids, tokens))


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
) -> list[Answer]:
    """The model's greedy answer to each prompt (token ids): always the most likely token. An answer ends at one of
    `stop_ids`, after `max_new_tokens`, or at the model's last position if it has no embeddings for more. The model's
    own generation_config is not used. `done` gets the answers of each batch by the number of their prompt. A UserError
    if a prompt is longer than the model's positions."""
    causal = causal_of(model)
    positions = positions_of(causal.config.to_dict())
    limit = positions.limit if positions and positions.hard else None  # of the embeddings of positions
    rooms = answer_rooms(prompts, max_new_tokens, limit)
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

    rows = _PROMPTS_ON_CPU if causal.device.type == "cpu" else _PROMPTS
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
