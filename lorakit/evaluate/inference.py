"""Asking one subject: its losses, answers and likelihoods of labels, each from the cache where they are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.evaluate.cache import as_line, from_line, get_or_compute, open_cache, prompt_key, row_key
from lorakit.evaluate.generate import Answer, greedy_answers
from lorakit.evaluate.labels import Labels
from lorakit.evaluate.likelihood import label_loglikelihoods
from lorakit.evaluate.loaded import ModelLoader
from lorakit.evaluate.losses import row_losses
from lorakit.evaluate.models import EvalModelSpec
from lorakit.evaluate.rendering import RenderedRows
from lorakit.evaluate.results import ModelOutputs
from lorakit.model.fused_lora import fused_lora
from lorakit.progress import Progress

Tell = Callable[[Mapping[int, Any]], None]


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A subject that can be asked: `model` brings its model into memory, which stays the subject's until the next
    one's is asked for. `facts` are all that decides what it computes."""

    spec: EvalModelSpec
    rendered: RenderedRows
    identity: dict[str, Any]
    loaded: ModelLoader
    cache: bool
    progress: Progress

    @property
    def model(self) -> Any:
        """The subject's model, in evaluation mode."""
        return self.loaded.model_of(self.spec)


Probe = Callable[[EvalModel], Any]
"""What else is to be found out of a subject while its model may be in memory, such as its loss on other texts."""


@dataclass(frozen=True)
class EvalRequest:
    """What every subject is asked for. `probes` by their name."""

    generate: bool
    max_new_tokens: int
    labels: Mapping[str, Labels] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)


def run_model(eval_model: EvalModel, wanted: EvalRequest) -> ModelOutputs:
    """All that is wanted of one subject.

    Raises:
        UserError, LorakitError: its model cannot be loaded, or gives no numbers.
    """
    nats = compute_losses(eval_model)
    said = generate_answers(eval_model, eval_model.rendered.prompts, wanted.max_new_tokens) if wanted.generate else []
    likelihoods = {task: compute_label_likelihoods(eval_model, labels) for task, labels in wanted.labels.items()}
    probed = {name: probe(eval_model) for name, probe in wanted.probes.items()}
    return ModelOutputs(nats, said, likelihoods, probed)


def compute_losses(eval_model: EvalModel) -> np.ndarray:
    """The loss summed over the trained tokens of each row (rows,), in nats."""
    rows = eval_model.rendered.rows

    def compute(missing: list[int], tell: Tell) -> None:
        model, label = eval_model.model, f"{eval_model.spec.name}: loss"
        chosen = [rows[at] for at in missing]
        with fused_lora(model):
            row_losses(model, chosen, eval_model.rendered.pad, label, eval_model.progress, _told(missing, tell))

    kept = open_cache("losses", eval_model.identity, eval_model.cache)
    return np.array(get_or_compute(kept, [row_key(row) for row in rows], compute), dtype=float)


def generate_answers(eval_model: EvalModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
    """The greedy answer to each prompt."""
    rendered = eval_model.rendered

    def compute(missing: list[int], tell: Tell) -> None:
        model, label = eval_model.model, f"{eval_model.spec.name}: answers"
        chosen = [prompts[at] for at in missing]
        told = _told(missing, lambda found: tell({at: as_line(answer) for at, answer in found.items()}))
        with fused_lora(model):
            greedy_answers(
                model, chosen, rendered.stop_ids, max_new_tokens, rendered.pad, label, eval_model.progress, told
            )

    decoding = {"decoding": "greedy", "max_new_tokens": max_new_tokens, "stops": rendered.stop_ids}
    kept = open_cache("answers", eval_model.identity | decoding, eval_model.cache)
    return [from_line(value) for value in get_or_compute(kept, [prompt_key(prompt) for prompt in prompts], compute)]


def compute_label_likelihoods(eval_model: EvalModel, labels: Labels) -> np.ndarray:
    """The log-probability of each label behind each of the labels' prompts (rows, labels), in nats."""
    rendered = eval_model.rendered
    prompts = [rendered.rows[row]["input_ids"][: rendered.rows[row]["answer"]] for row in labels.rows]

    def compute(missing: list[int], tell: Tell) -> None:
        model, note = eval_model.model, f"{eval_model.spec.name}: labels"
        chosen = [prompts[at] for at in missing]
        with fused_lora(model):
            tokens = [list(one) for one in labels.tokens]
            found = label_loglikelihoods(model, chosen, tokens, rendered.pad, eval_model.progress, note)
        tell(dict(zip(missing, found.tolist(), strict=True)))

    kept = open_cache("labels", eval_model.identity | {"labels": labels.tokens}, eval_model.cache)
    return np.array(get_or_compute(kept, [prompt_key(prompt) for prompt in prompts], compute), dtype=float)


def _told(numbers: list[int], tell: Tell) -> Tell:
    """`tell`, for someone who counts only the rows that were missing."""
    return lambda found: tell({numbers[at]: value for at, value in found.items()})
