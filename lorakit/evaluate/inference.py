"""Running one model on the rows: its losses, answers and likelihoods of labels, computed or from the cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.evaluate.cache import digest, get_or_compute, open_cache
from lorakit.evaluate.classification import Labels
from lorakit.evaluate.generate import Answer, greedy_answers
from lorakit.evaluate.likelihood import label_loglikelihoods, row_losses
from lorakit.evaluate.models import EvalModelSpec
from lorakit.evaluate.rendering import RenderedRows
from lorakit.model.fused_lora import fused_lora
from lorakit.model.load import load_model
from lorakit.model.peft_adapter import SharedBase
from lorakit.progress import Progress

Save = Callable[[Mapping[int, Any]], None]


@dataclass
class ModelLoader:
    """Keeps one base in memory and puts adapters on it."""

    device: str
    _key: tuple[Any, ...] | None = field(default=None, repr=False)
    _base: SharedBase | None = field(default=None, repr=False)

    def model_of(self, spec: EvalModelSpec) -> Any:
        """The model in evaluation mode; the one before it is not usable any more."""
        if self._base is None or self._key != spec.base_key:
            self._base = None  # free its memory before the next one is read
            self._base = SharedBase(lambda: load_model(spec.base, spec.settings, self.device))
            self._key = spec.base_key
        return self._base.model_with(spec.adapter)


def loading_order(specs: Sequence[EvalModelSpec]) -> list[int]:
    """The numbers of the models, so that each base is loaded once, and scored before any adapter was on it."""
    keys = [spec.base_key for spec in specs]
    return sorted(range(len(specs)), key=lambda at: (keys.index(keys[at]), specs[at].adapter is not None, at))


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A model to run on rows. `identity` is all that decides what it computes; `cache` is whether to use the cache."""

    spec: EvalModelSpec
    rendered: RenderedRows
    identity: dict[str, Any]
    loader: ModelLoader
    cache: bool
    progress: Progress

    @property
    def model(self) -> Any:
        """The model itself, loaded on first use and valid until another one is."""
        return self.loader.model_of(self.spec)


Probe = Callable[[EvalModel], Any]
"""Something else to measure while a model may be in memory, such as its loss on other texts."""


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """What a model computed. `nats` (rows,): the loss summed over each row's trained tokens. `answers`: one to each
    row that has one, none if no metric needs them. `likelihoods` (rows of the task, labels), in nats, by the task's
    tag. `probed`: the results of probes, by name."""

    nats: np.ndarray
    answers: list[Answer]
    likelihoods: dict[str, np.ndarray]
    probed: dict[str, Any]


def run_model(
    eval_model: EvalModel, max_new_tokens: int, labels: Mapping[str, Labels], probes: Mapping[str, Probe]
) -> ModelOutputs:
    """Compute everything that one model is scored on. Without `max_new_tokens` (0) no answers are generated."""
    nats = compute_losses(eval_model)
    answers = generate_answers(eval_model, eval_model.rendered.prompts if max_new_tokens else [], max_new_tokens)
    likelihoods = {task: _label_likelihoods(eval_model, of_task) for task, of_task in labels.items()}
    return ModelOutputs(nats, answers, likelihoods, {name: probe(eval_model) for name, probe in probes.items()})


def compute_losses(eval_model: EvalModel) -> np.ndarray:
    """The loss summed over the trained tokens of each row (rows,), in nats."""
    rows, pad = eval_model.rendered.rows, eval_model.rendered.pad

    def compute(missing: list[int], save: Save) -> None:
        model, note = eval_model.model, f"{eval_model.spec.name}: loss"
        with fused_lora(model):
            row_losses(model, [rows[at] for at in missing], pad, note, eval_model.progress, save)

    file = open_cache("losses", eval_model.identity, eval_model.cache)
    keys = [digest([list(row["input_ids"]), list(row["labels"])]) for row in rows]
    return np.array(get_or_compute(file, keys, compute), dtype=float)


def generate_answers(eval_model: EvalModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
    """The greedy answer to each prompt."""
    stop_ids, pad = eval_model.rendered.stop_ids, eval_model.rendered.pad

    def compute(missing: list[int], save: Save) -> None:
        model, note, chosen = eval_model.model, f"{eval_model.spec.name}: answers", [prompts[at] for at in missing]
        with fused_lora(model):
            greedy_answers(model, chosen, stop_ids, max_new_tokens, pad, note, eval_model.progress, save)

    if not prompts:
        return []
    decoding = {"decoding": "greedy", "max_new_tokens": max_new_tokens, "stops": stop_ids}
    file = open_cache("answers", eval_model.identity | decoding, eval_model.cache)
    lines = get_or_compute(file, [digest(list(prompt)) for prompt in prompts], compute)
    return [Answer(tuple(tokens), bool(ended)) for tokens, ended in lines]


def _label_likelihoods(eval_model: EvalModel, labels: Labels) -> np.ndarray:
    """The log-probability of each label after each of the labels' prompts (rows, labels), in nats."""
    rendered = eval_model.rendered
    prompts = [rendered.rows[row]["input_ids"][: rendered.rows[row]["answer"]] for row in labels.rows]

    def compute(missing: list[int], save: Save) -> None:
        model, note, chosen = eval_model.model, f"{eval_model.spec.name}: labels", [prompts[at] for at in missing]
        with fused_lora(model):
            values = label_loglikelihoods(model, chosen, labels.tokens, rendered.pad, eval_model.progress, note)
        save(dict(enumerate(values.tolist())))

    file = open_cache("labels", eval_model.identity | {"labels": labels.tokens}, eval_model.cache)
    return np.array(get_or_compute(file, [digest(list(prompt)) for prompt in prompts], compute), dtype=float)
