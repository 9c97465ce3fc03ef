"""Classification by likelihood: how probable a model finds each label behind a prompt, and what follows from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorakit.data.batches import collate
from lorakit.data.conversations import IGNORED
from lorakit.errors import LorakitError, UserError
from lorakit.model.loss import head_logits
from lorakit.model.shared_prefix import body_output
from lorakit.progress import Progress

# Tokens with padding in a batch, the rows it has in any case, and logits held at once (128 MiB in float32).
_TOKENS, _ROWS, _LOGITS = 4096, 8, 1 << 25


@dataclass(frozen=True)
class _Path:
    """One way through the labels: the tokens of a label, and which log-probabilities at its positions count for whom.

    `reads`: position, token, label. A token that several labels share is scored once for all of them.
    """

    tokens: tuple[int, ...]
    reads: tuple[tuple[int, int, int], ...]


def label_loglikelihoods(
    model: Any,
    prompts: Sequence[list[int]],
    labels: Sequence[list[int]],
    pad: int,
    progress: Progress,
    note: str = "labels",
) -> np.ndarray:
    """The log-probability of each label behind each prompt (prompts, labels), in nats, summed over the label's tokens.

    Args:
        model: a causal language model in evaluation mode, or a PEFT model around one.
        prompts, labels: token ids, as they follow each other. Whether a label ends with a stop token is the caller's.
        pad: the id that fills rows up. note: the progress bar's label.

    Labels of one token each are read off one row a prompt. Of longer ones a batch is one prompt's rows, whose common
    beginning is computed once (lorakit.model.shared_prefix).

    Raises:
        UserError: a prompt or a label has no tokens.
        LorakitError: the model gives no numbers.
    """
    if not labels or not all(labels):
        raise UserError("classification: a label has no tokens. Write labels of at least one character.")
    if not all(prompts):
        raise UserError("classification: a prompt has no tokens, so that nothing stands before the label.")
    paths = _paths([tuple(label) for label in labels])
    found = np.zeros((len(prompts), len(labels)))
    with torch.inference_mode(), progress.bar(note, total=len(prompts)) as bar:
        for batch in _batches([len(prompt) for prompt in prompts], paths):
            _score(model, prompts, paths, batch, pad, found)
            bar.advance(len({prompt for prompt, path in batch if path == 0}))
    if not np.isfinite(found).all():
        raise LorakitError(f"{note}: this model gives no numbers for the labels. Its weights are broken.")
    return found


def _paths(labels: Sequence[tuple[int, ...]]) -> list[_Path]:
    """The fewest ways that pass every token of every label: labels that differ in the last token share one."""
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
    # The last token stands only so that the state before it predicts something: any label of this stem will do.
    whole = {label[:-1]: label for label in labels}
    return [_Path(whole[leaf], tuple(read)) for leaf, read in zip(leaves, reads, strict=True)]


def _batches(lengths: Sequence[int], paths: Sequence[_Path]) -> Iterator[list[tuple[int, int]]]:
    """Batches of (prompt, path): one prompt's paths, or prompts of like length where there is one path."""
    order = sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt])
    longest = max(len(path.tokens) for path in paths)
    groups = [order] if len(paths) == 1 else [[prompt] for prompt in order]
    for group in groups:
        pairs = [(prompt, path) for prompt in group for path in range(len(paths))]
        while pairs:
            rows = max(_ROWS, _TOKENS // (lengths[pairs[0][0]] + longest))
            yield pairs[:rows]
            pairs = pairs[rows:]


def _score(
    model: Any,
    prompts: Sequence[list[int]],
    paths: Sequence[_Path],
    batch: Sequence[tuple[int, int]],
    pad: int,
    found: np.ndarray,
) -> None:
    """Add what one batch says of each label to `found`."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = [
        {
            "input_ids": [*prompts[prompt], *paths[path].tokens],
            "labels": [IGNORED] * len(prompts[prompt]) + list(paths[path].tokens),
        }
        for prompt, path in batch
    ]
    tensors = {key: value.to(model.device) for key, value in collate(rows, pad).items()}
    output, skipped = body_output(causal, tensors["input_ids"], tensors["attention_mask"], tensors["labels"], IGNORED)
    hidden = output.last_hidden_state[:, :-1][tensors["labels"][:, 1 + skipped :] != IGNORED]
    starts = np.cumsum([0, *(len(paths[path].tokens) for _, path in batch)])
    reads = [
        (start + position, token, prompt, label)
        for start, (prompt, path) in zip(starts, batch, strict=False)
        for position, token, label in paths[path].reads
    ]
    at, tokens, of_prompt, of_label = np.array(reads).T
    scores = _logprobs(causal, output, hidden, torch.from_numpy(at), torch.from_numpy(tokens))
    np.add.at(found, (of_prompt, of_label), scores)


def _logprobs(causal: Any, output: Any, hidden: torch.Tensor, at: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """The log-probability of each token at its place among the states (places, width), the head a chunk at a time."""
    chunk = max(1, _LOGITS // causal.config.get_text_config().vocab_size)
    found = np.empty(len(at))
    for start in range(0, len(hidden), chunk):
        here = (at >= start) & (at < start + chunk)
        logits = head_logits(causal, output, hidden[start : start + chunk]).float()
        normalizer = logits.logsumexp(-1)
        places, wanted = (at[here] - start).to(logits.device), tokens[here].to(logits.device)
        found[here.numpy()] = (logits[places, wanted] - normalizer[places]).double().cpu().numpy()
    return found
