"""What a model predicts at the trained positions of rows, in little memory and few forwards.

A model may read its weights anew in each forward (lorakit.model.layerwise), so rows go through in few, large batches,
and its head is run on the trained positions of all rows together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.data.batches import collate
from lorakit.model.loss import IGNORED, head_logits
from lorakit.model.shared_prefix import body_of
from lorakit.progress import Progress

Row = dict[str, Any]

# Logits that the head makes at once, or those of so many positions: each time it may be read anew.
_HEAD_LOGITS, _HEAD_POSITIONS = 1 << 23, 128
# Numbers in a batch's hidden states, of which a block makes some ten times as many; and in its attention scores.
_STATES, _SCORES = 1 << 21, 1 << 25


@dataclass(frozen=True)
class States:
    """The states that predict the trained tokens of all batches, on the CPU."""

    hidden: torch.Tensor
    """(positions, width)."""
    targets: torch.Tensor
    """(positions): the trained tokens."""
    row_of: torch.Tensor
    """(positions): whose row's they are."""
    output: Any
    """What else the model's body gave, for its head."""


def causal_of(model: Any) -> Any:
    """The causal language model itself, out of PEFT's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def first_rows(rows: Sequence[Row], limit: int) -> list[Row]:
    """The first rows whose trained positions stay within the limit, those without any left out."""
    chosen: list[Row] = []
    left = limit
    for row in rows:
        trained = [at for at, label in enumerate(row["labels"]) if at and label != IGNORED]
        if chosen and len(trained) > left:
            break
        if trained:
            end = trained[limit] if len(trained) > limit else len(row["labels"])
            chosen.append({key: row[key][:end] for key in ("input_ids", "labels")})
            left -= len(trained)
    return chosen


def batches_of(lengths: list[int], config: Any) -> list[list[int]]:
    """As few batches as keep a pass over them small, each of rows of about one length, by their index."""
    text = config.get_text_config()
    heads = (getattr(text, "num_attention_heads", 0) or 0) if config._attn_implementation == "eager" else 0
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        tokens = longest * (len(batches[-1]) + 1) if batches else 0
        if batches and tokens * text.hidden_size <= _STATES and tokens * longest * heads <= _SCORES:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def states_of(
    causal: Any, rows: list[Row], batches: list[list[int]], pad_token_id: int, progress: Progress, name: str
) -> States:
    """What the model's body makes of the batches (indices of rows); `name` is the model's, for the progress."""
    hidden, targets, row_of, output = [], [], [], None
    with progress.bar(f"{name} on the rows", total=len(rows)) as bar, torch.inference_mode():
        for batch in batches:
            tensors = collate([rows[index] for index in batch], pad_token_id)
            labels = tensors.pop("labels")[:, 1:]
            trained = labels != IGNORED
            given = {key: value.to(causal.device) for key, value in tensors.items()}
            output = body_of(causal)(**given, use_cache=False)
            hidden.append(output.last_hidden_state[:, :-1][trained.to(causal.device)].cpu())
            targets.append(labels[trained])
            row_of.append(torch.tensor(batch)[trained.nonzero()[:, 0]])
            bar.advance(len(batch))
    return States(torch.cat(hidden), torch.cat(targets), torch.cat(row_of), output)


@torch.inference_mode()
def logits_of(causal: Any, states: States) -> Iterator[torch.Tensor]:
    """The logits (positions, vocabulary) of the states, float32 on the CPU, some positions at a time."""
    vocabulary = causal.config.get_text_config().vocab_size
    for hidden in states.hidden.split(max(_HEAD_LOGITS // vocabulary, _HEAD_POSITIONS)):
        yield head_logits(causal, states.output, hidden.to(causal.device)).float().cpu()
