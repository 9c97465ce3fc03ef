"""Forward passes in batches that fit into memory: losses of rows, and log-probabilities of labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorakit.data.batches import collate
from lorakit.data.rows import IGNORED
from lorakit.errors import LorakitError, UserError
from lorakit.model.generation import in_batches, tokens_at_once
from lorakit.model.loss import causal_of, head_logits, trained_states
from lorakit.progress import Progress

# Rows in a batch; of labels also more, up to so many tokens with padding; and logits held at once (128 MiB in float32).
_ROWS, _TOKENS, _LOGITS = 8, 4096, 1 << 25
BROKEN = "Its weights are broken."


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
