"""The loss of each row: the summed cross-entropy of its trained tokens, and how many they are."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lorakit.data.batches import collate
from lorakit.data.conversations import IGNORED
from lorakit.errors import LorakitError
from lorakit.evaluate.batching import in_batches, tokens_at_once
from lorakit.model.loss import head_logits
from lorakit.model.shared_prefix import body_output
from lorakit.progress import Progress

# Rows in a batch, and logits held at once (128 MiB in float32).
_ROWS, _LOGITS = 8, 1 << 25

Done = Callable[[dict[int, float]], None]
"""What is told of a batch: the nats of its rows by their number."""


def trained_tokens(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """How many tokens of each row are predicted and counted (rows,)."""
    return np.array([sum(label != IGNORED for label in row["labels"][1:]) for row in rows], dtype=float)


def row_losses(
    model: Any, rows: Sequence[dict[str, Any]], pad: int, label: str, progress: Progress, done: Done | None = None
) -> np.ndarray:
    """The summed cross-entropy (rows,) in nats over the trained tokens of each row, in float32.

    Args:
        model: a causal language model in evaluation mode, or a PEFT model around one.
        rows: with `input_ids` and `labels` (-100 where not trained).
        label: the progress bar's. done: told of each batch.

    Raises:
        LorakitError: the model gives no numbers, or a row does not fit into memory.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    nats = np.zeros(len(rows))
    with torch.inference_mode(), progress.bar(label, total=len(rows)) as bar:

        def work(batch: list[int]) -> list[int]:
            nats[batch] = _batch_losses(causal, [rows[index] for index in batch], pad)
            if not np.isfinite(nats[batch]).all():
                raise LorakitError(
                    f"{label}: {nats[batch].sum()}: this model gives no numbers on the held-out rows. Its weights are "
                    "broken."
                )
            if done:
                done({index: float(nats[index]) for index in batch})
            bar.advance(len(batch))
            return []

        in_batches(range(len(rows)), lambda index: len(rows[index]["input_ids"]), _ROWS, tokens_at_once(causal), work)
    return nats


def _batch_losses(causal: Any, rows: list[dict[str, Any]], pad: int) -> np.ndarray:
    tensors = {key: value.to(causal.device) for key, value in collate(rows, pad).items()}
    labels = tensors["labels"]
    output, skipped = body_output(causal, tensors["input_ids"], tensors["attention_mask"], labels, IGNORED)
    targets = labels[:, 1 + skipped :]
    trained = targets != IGNORED
    hidden, row_of = output.last_hidden_state[:, :-1][trained], trained.nonzero()[:, 0].cpu().numpy()
    chunk = max(1, _LOGITS // causal.config.get_text_config().vocab_size)
    found = np.zeros(len(rows))
    parts = zip(hidden.split(chunk), targets[trained].split(chunk), strict=True)
    for start, (some_hidden, some_targets) in zip(range(0, len(hidden), chunk), parts, strict=True):
        logits = head_logits(causal, output, some_hidden).float()
        lost = logits.logsumexp(-1) - logits.gather(-1, some_targets[:, None])[:, 0]
        np.add.at(found, row_of[start : start + chunk], lost.double().cpu().numpy())
    return found
