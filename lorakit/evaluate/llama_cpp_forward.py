"""GGUF files run by llama.cpp: losses of rows, log-probabilities of labels and greedy answers, with the functions that
lorakit/evaluate/forward.py has for models of torch. `pad` is not needed here: rows of any lengths are decoded at once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from lorakit.amounts import decimal_bytes
from lorakit.data.answers import until_stop
from lorakit.data.rows import IGNORED
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.forward import BROKEN, LabelPath, label_paths
from lorakit.hardware.machine import processor
from lorakit.model.generation import Answer, answer_rooms, in_batches
from lorakit.model.llama_cpp import GgufModel, Token
from lorakit.progress import Progress

# Sequences that are decoded at once. Measured on SmolLM2-135M in f16 on one core: 57 tokens a second with 1, 95 with 8,
# 124 with 16, 132 with 32, while each one attends, masked, to the keys of all.
_SEQUENCES = 16
# Tokens at once where no row needs more; the share of free memory that their keys and values may take, llama.cpp's
# work space needs the rest; and logits that are read at once (128 MiB in float32).
_TOKENS, _SHARE, _LOGITS = 4096, 0.25, 1 << 25


class _Sequences:
    """The sequences that a model holds. Number 0 is the beginning that all texts of a call share: it is computed once,
    and sequences start as copies of it."""

    def __init__(self, model: GgufModel, texts: Sequence[Sequence[int]], shared: int, more: int = 0) -> None:
        """`shared`: the most tokens that may be in the beginning; `more`: tokens that come after a text."""
        self.model = model
        self.beginning = _common_beginning([list(text[:shared]) for text in texts]) if len(texts) > 1 else []
        longest = max((len(text) + more for text in texts), default=1)
        self.room = _reserve(model, longest + len(self.beginning), max(_TOKENS, longest)) - len(self.beginning)
        model.forget()
        if self.beginning:
            model.decode([Token(0, at, token, False) for at, token in enumerate(self.beginning)])

    def start(self, sequence: int, text: Sequence[int], wanted: Sequence[int]) -> list[Token]:
        """The tokens of a new sequence that are not computed yet; the logits after the positions `wanted` are read."""
        if self.beginning:
            self.model.copy(0, sequence)
        first, read = len(self.beginning), set(wanted)
        return [Token(sequence, at, text[at], at in read) for at in range(first, len(text))]

    def logits(self, tokens: Sequence[Token]) -> Iterator[tuple[list[Token], np.ndarray]]:
        """Decode tokens, as many at once as their logits may be; the tokens whose logits were wanted, and these
        (tokens, vocabulary)."""
        most, chunk, wanted = max(1, _LOGITS // self.model.vocabulary), list[Token](), 0
        for at, token in enumerate(tokens, start=1):
            chunk.append(token)
            wanted += token.wanted
            if wanted == most or at == len(tokens):
                yield [one for one in chunk if one.wanted], self.model.decode(chunk)
                chunk, wanted = [], 0


def _common_beginning(texts: Sequence[list[int]]) -> list[int]:
    first, last = min(texts), max(texts)  # in the order of a dictionary all others lie between them
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]


def _reserve(model: GgufModel, least: int, most: int) -> int:
    """Make room for tokens: what memory allows up to `most`, and at least `least`; how many fit. A LorakitError where
    memory lacks for `least`."""
    what = f"out of memory on one row of {least:,} tokens"
    remedy = "Give shorter rows, a smaller --max-new-tokens, or a machine with more memory."
    free, each = processor().memory, max(model.bytes_per_token, 1)
    if least * each > free:  # the system would end the process before llama.cpp sees that memory lacks
        raise LorakitError(f"{what}: its keys and values take {decimal_bytes(least * each)}. {remedy}")
    tokens = max(least, min(most, int(free * _SHARE / each)))
    while True:
        try:
            model.reserve(tokens, _SEQUENCES + 1)
            return tokens
        except LorakitError as error:
            if tokens == least:
                raise LorakitError(f"{what}: {error} {remedy}") from error
            tokens = max(least, tokens // 2)


def row_losses(
    model: GgufModel,
    rows: Sequence[dict[str, Any]],
    pad: int,
    label: str,
    progress: Progress,
    done: Callable[[dict[int, float]], None] = lambda losses: None,
) -> np.ndarray:
    """The summed cross-entropy (rows,) in nats over the trained tokens of each row; an error if it is NaN. `done` gets
    the losses of each batch by the number of their row."""
    trained = [[at for at, token in enumerate(row["labels"][1:]) if token != IGNORED] for row in rows]
    # What follows the last position that is read changes nothing.
    texts = [row["input_ids"][: of_row[-1] + 1 if of_row else 1] for row, of_row in zip(rows, trained, strict=True)]
    nats = np.zeros(len(rows))
    with progress.bar(label, total=len(rows)) as bar:
        sequences = _Sequences(model, texts, min((of_row[0] for of_row in trained if of_row), default=0))

        def work(batch: list[int]) -> list[int]:
            losses, tokens = np.zeros(len(batch)), list[Token]()
            for sequence, number in enumerate(batch, start=1):
                tokens += sequences.start(sequence, texts[number], trained[number])
            for wanted, logits in sequences.logits(tokens):
                targets = [rows[batch[one.sequence - 1]]["labels"][one.position + 1] for one in wanted]
                np.add.at(losses, [one.sequence - 1 for one in wanted], -_log_probabilities(logits, targets))
            for sequence in range(1, len(batch) + 1):
                model.forget(sequence)
            if not np.isfinite(losses).all():
                raise LorakitError(f"{label}: {losses.sum()}: this model gives no numbers on the rows. {BROKEN}")
            nats[batch] = losses
            done(dict(zip(batch, losses.tolist(), strict=True)))
            bar.advance(len(batch))
            return []

        in_batches(range(len(rows)), lambda number: len(texts[number]), _SEQUENCES, sequences.room, work)
    return nats


def _log_probabilities(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """The log-probability (tokens,) of a target after each row of logits (tokens, vocabulary)."""
    highest = logits.max(axis=1, keepdims=True)
    spread = np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), list(targets)]
    return chosen.astype(np.float64) - highest[:, 0] - np.log(spread)


@dataclass(eq=False)
class _Generation:
    """An answer while it is written, in one of the sequences, at most `room` tokens."""

    number: int
    sequence: int
    room: int
    tokens: list[int] = field(default_factory=list)

    def is_over(self, stop_ids: Sequence[int]) -> bool:
        return len(self.tokens) >= self.room or self.tokens[-1] in stop_ids


def greedy_answers(
    model: GgufModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad: int,
    label: str,
    progress: Progress,
    done: Callable[[dict[int, Answer]], None] = lambda answers: None,
) -> list[Answer]:
    """The model's greedy answer to each prompt (token ids): always the most likely token. An answer ends at one of
    `stop_ids`, after `max_new_tokens`, or at the model's last position if it has no embeddings for more. `done` gets
    answers by the number of their prompt. A UserError if a prompt is longer than the model's positions."""
    rooms = answer_rooms(prompts, max_new_tokens, model.limit)
    shortest = min(map(len, prompts), default=1)
    answers: dict[int, Answer] = {}
    with progress.bar(label, total=len(prompts)) as bar:
        sequences = _Sequences(model, prompts, shortest - 1, max_new_tokens)
        waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        live: dict[int, _Generation] = {}
        while waiting or live:
            tokens = [_last_token(one, prompts[one.number]) for one in live.values()]
            while waiting and _has_room(sequences, [len(prompts[one.number]) for one in live.values()], max_new_tokens):
                number = waiting.popleft()
                sequence = next(one for one in range(1, _SEQUENCES + 1) if one not in live)
                live[sequence] = _Generation(number, sequence, rooms[number])
                tokens += sequences.start(sequence, prompts[number], [len(prompts[number]) - 1])
            for one, token in zip(live.values(), model.decode_greedily(tokens), strict=True):
                one.tokens.append(token)
            finished = {}
            for one in [one for one in live.values() if one.is_over(stop_ids)]:
                del live[one.sequence]
                model.forget(one.sequence)
                finished[one.number] = Answer(tuple(until_stop(one.tokens, stop_ids)), one.tokens[-1] in stop_ids)
            if finished:
                answers |= finished
                done(finished)
                bar.advance(len(finished))
    return [answers[number] for number in range(len(prompts))]


def _has_room(sequences: _Sequences, lengths: Sequence[int], max_new_tokens: int) -> bool:
    """Whether another prompt fits beside those of these lengths, which is at most as long as the last of them."""
    if not lengths:
        return True
    tokens = sum(lengths) + lengths[-1] + (len(lengths) + 1) * max_new_tokens
    return len(lengths) < _SEQUENCES and tokens <= sequences.room


def _last_token(one: _Generation, prompt: Sequence[int]) -> Token:
    return Token(one.sequence, len(prompt) + len(one.tokens) - 1, one.tokens[-1], True)


def label_loglikelihoods(
    model: GgufModel,
    prompts: Sequence[list[int]],
    labels: Sequence[Sequence[int]],
    pad: int,
    progress: Progress,
    note: str = "labels",
) -> np.ndarray:
    """The log-probability of each label after each prompt (prompts, labels), in nats, summed over the label's tokens.
    A prompt is computed once, and labels that begin alike share that beginning (`label_paths`)."""
    if not labels or not all(labels) or not all(prompts):
        raise UserError("classification: a label or a prompt has no tokens. Write labels and prompts with some text.")
    paths = label_paths([tuple(label) for label in labels])
    scores = np.zeros((len(prompts), len(labels)))
    more = sum(len(path.tokens) for path in paths[:_SEQUENCES])
    with progress.bar(note, total=len(prompts)) as bar:
        sequences = _Sequences(model, prompts, min(map(len, prompts)) - 1, more)
        for number, prompt in enumerate(prompts):
            tokens = sequences.start(1, prompt, [len(prompt) - 1])
            logits = model.decode(tokens)
            _add_scores(logits[0], paths, 0, scores[number])
            longer = [path for path in paths if len(path.tokens) > 1]
            while longer:
                _follow(sequences, len(prompt), longer[: _SEQUENCES - 1], scores[number])
                longer = longer[_SEQUENCES - 1 :]
            model.forget(1)
            bar.advance()
    if not np.isfinite(scores).all():
        raise LorakitError(f"{note}: this model gives no numbers for the labels. {BROKEN}")
    return scores


def _follow(sequences: _Sequences, start: int, paths: Sequence[LabelPath], scores: np.ndarray) -> None:
    """Add the log-probabilities along paths, each in a copy of the prompt of `start` tokens in sequence 1."""
    tokens = []
    for sequence, path in enumerate(paths, start=2):
        sequences.model.copy(1, sequence)
        tokens += [Token(sequence, start + at, token, True) for at, token in enumerate(path.tokens[:-1])]
    for wanted, logits in sequences.logits(tokens):
        for one, of_one in zip(wanted, logits, strict=True):
            _add_scores(of_one, [paths[one.sequence - 2]], one.position - start + 1, scores)
    for sequence in range(2, len(paths) + 2):
        sequences.model.forget(sequence)


def _add_scores(logits: np.ndarray, paths: Sequence[LabelPath], position: int, scores: np.ndarray) -> None:
    """Add what the logits at one position of paths say of their labels."""
    reads = [(token, label) for path in paths for at, token, label in path.reads if at == position]
    if reads:
        tokens, of_label = zip(*reads, strict=True)
        repeated = np.broadcast_to(logits, (len(reads), len(logits)))
        np.add.at(scores, list(of_label), _log_probabilities(repeated, tokens))
