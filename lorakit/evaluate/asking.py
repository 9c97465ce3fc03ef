"""Asking one subject: its losses, answers and likelihoods of labels, each from the cache where they are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.evaluate.asked import Asked
from lorakit.evaluate.cached import as_line, by_content, from_line, opened, prompt_name, row_name
from lorakit.evaluate.generate import Answer, answers_to
from lorakit.evaluate.labels import Labels
from lorakit.evaluate.likelihood import label_loglikelihoods
from lorakit.evaluate.loaded import Loaded
from lorakit.evaluate.losses import row_losses
from lorakit.evaluate.scored import Found
from lorakit.evaluate.subjects import Subject
from lorakit.model.fused import fused_lora
from lorakit.progress import Progress

Tell = Callable[[Mapping[int, Any]], None]


@dataclass(frozen=True, eq=False)
class Witness:
    """A subject that can be asked: `model` brings its model into memory, which stays the subject's until the next
    one's is asked for. `facts` are all that decides what it computes."""

    subject: Subject
    asked: Asked
    facts: dict[str, Any]
    loaded: Loaded
    cache: bool
    progress: Progress

    @property
    def model(self) -> Any:
        """The subject's model, in evaluation mode."""
        return self.loaded.model_of(self.subject)


Probe = Callable[[Witness], Any]
"""What else is to be found out of a subject while its model may be in memory, such as its loss on other texts."""


@dataclass(frozen=True)
class Wanted:
    """What every subject is asked for. `probes` by their name."""

    generate: bool
    max_new_tokens: int
    labels: Mapping[str, Labels] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)


def ask(witness: Witness, wanted: Wanted) -> Found:
    """All that is wanted of one subject.

    Raises:
        UserError, LorakitError: its model cannot be loaded, or gives no numbers.
    """
    nats = losses_of(witness)
    said = answers_of(witness, witness.asked.prompts, wanted.max_new_tokens) if wanted.generate else []
    likelihoods = {task: likelihoods_of(witness, labels) for task, labels in wanted.labels.items()}
    probed = {name: probe(witness) for name, probe in wanted.probes.items()}
    return Found(nats, said, likelihoods, probed)


def losses_of(witness: Witness) -> np.ndarray:
    """The loss summed over the trained tokens of each row (rows,), in nats."""
    rows = witness.asked.rows

    def compute(missing: list[int], tell: Tell) -> None:
        model, label = witness.model, f"{witness.subject.name}: loss"
        chosen = [rows[at] for at in missing]
        with fused_lora(model):
            row_losses(model, chosen, witness.asked.pad, label, witness.progress, _told(missing, tell))

    kept = opened("losses", witness.facts, witness.cache)
    return np.array(by_content(kept, [row_name(row) for row in rows], compute), dtype=float)


def answers_of(witness: Witness, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
    """The greedy answer to each prompt."""
    asked = witness.asked

    def compute(missing: list[int], tell: Tell) -> None:
        model, label = witness.model, f"{witness.subject.name}: answers"
        chosen = [prompts[at] for at in missing]
        told = _told(missing, lambda found: tell({at: as_line(answer) for at, answer in found.items()}))
        with fused_lora(model):
            answers_to(model, chosen, asked.stop_ids, max_new_tokens, asked.pad, label, witness.progress, told)

    decoding = {"decoding": "greedy", "max_new_tokens": max_new_tokens, "stops": asked.stop_ids}
    kept = opened("answers", witness.facts | decoding, witness.cache)
    return [from_line(value) for value in by_content(kept, [prompt_name(prompt) for prompt in prompts], compute)]


def likelihoods_of(witness: Witness, labels: Labels) -> np.ndarray:
    """The log-probability of each label behind each of the labels' prompts (rows, labels), in nats."""
    asked = witness.asked
    prompts = [asked.rows[row]["input_ids"][: asked.rows[row]["answer"]] for row in labels.rows]

    def compute(missing: list[int], tell: Tell) -> None:
        model, note = witness.model, f"{witness.subject.name}: labels"
        chosen = [prompts[at] for at in missing]
        with fused_lora(model):
            tokens = [list(one) for one in labels.tokens]
            found = label_loglikelihoods(model, chosen, tokens, asked.pad, witness.progress, note)
        tell(dict(zip(missing, found.tolist(), strict=True)))

    kept = opened("labels", witness.facts | {"labels": labels.tokens}, witness.cache)
    return np.array(by_content(kept, [prompt_name(prompt) for prompt in prompts], compute), dtype=float)


def _told(numbers: list[int], tell: Tell) -> Tell:
    """`tell`, for someone who counts only the rows that were missing."""
    return lambda found: tell({numbers[at]: value for at, value in found.items()})
