"""Prompting as a rival of training: a model asked with a system text and examples in its prompt, on the same rows.

Examples are rows of the training, as turns of user and assistant before the row's own messages: the same ones for all
rows, drawn by a seed, or for each row those whose questions are nearest to its own. Held-out rows are never among them.
"""

import json
import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.amounts import counted, format_difference
from lorakit.atomic_io import read_json_object
from lorakit.data.chat_prompts import answer_to, read_conversations
from lorakit.data.chat_template.templated_row import TemplatedRow
from lorakit.data.rows import IGNORED, Message, RowError
from lorakit.errors import UserError, first_line
from lorakit.evaluate.metric import Comparison, Measure, compare
from lorakit.evaluate.models import Choice, EvalModelSpec, ModelSet, Prompting
from lorakit.evaluate.rendering import RenderedRows, Turns, data_section, row_template
from lorakit.model.generation import Answer
from lorakit.prepare import GivenRows
from lorakit.progress import Progress
from lorakit.recipe.schema import Baselines, Recipe

if TYPE_CHECKING:
    from lorakit.evaluate.run import ModelResult


_ADVICE = {
    "worse": ". A prompt does better on these rows, without training",
    "cannot tell": ". These rows do not show that training beats a prompt; more rows may",
}


@dataclass(frozen=True)
class AnswerCosts:
    """What an answer takes, on average over so many: the tokens that the model reads and writes, and its share of the
    seconds of its batch (None where no time was measured)."""

    answers: int
    prompt_tokens: float
    answer_tokens: float
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class PromptingComparison:
    """A trained model against a prompted one, by every metric of answers, the main one first; `tokens_saved`: by how
    much its prompts are shorter."""

    trained: str
    prompted: str
    comparisons: dict[str, Comparison]
    measures: dict[str, Measure]
    tokens_saved: float

    def to_dict(self) -> dict[str, Any]:
        compared = {name: one.to_dict() for name, one in self.comparisons.items()}
        facts = {"model": self.trained, "against": self.prompted, "prompt_tokens_saved": self.tokens_saved}
        return {**facts, "scores": compared, "in_words": str(self)}

    def __str__(self) -> str:
        name, one = next(iter(self.comparisons.items()))
        measure = self.measures[name]
        signed = partial(format_difference, unit=measure.unit)
        interval = f", 95 % interval {signed(one.interval.low)} to {signed(one.interval.high)}" if one.interval else ""
        figures = (
            f"{measure.write(one.second)} instead of {measure.write(one.first)} ({signed(one.difference)}{interval})"
        )
        text = f"{self.trained} against {self.prompted}: {name} {one.verdict}, {figures}; "
        longer = f"{abs(self.tokens_saved):,.0f} tokens"
        text += f"its prompts are {longer} {'shorter' if self.tokens_saved >= 0 else 'longer'} each"
        return text + _ADVICE.get(one.verdict, "")


def costs_of(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> AnswerCosts:
    """The costs of generated answers to some prompts (token ids)."""
    seconds = [one.seconds for one in answers if one.seconds is not None]
    read, written = np.mean([len(one) for one in prompts]), np.mean([len(one.tokens) for one in answers])
    return AnswerCosts(len(answers), float(read), float(written), float(np.mean(seconds)) if seconds else None)


def compare_with_prompting(models: "Sequence[ModelResult]", seed: int) -> list[PromptingComparison]:
    """Each model that was trained against each that is prompted, where both answered."""
    compared = []
    for prompted in (model for model in models if model.spec.prompting and model.costs):
        for trained in (model for model in models if model.spec.kind in ("adapter", "merged", "model") and model.costs):
            first, second = (one.measures[""].get("answers", {}) for one in (prompted, trained))
            comparisons = compare(first, second, seed)
            if comparisons and prompted.costs and trained.costs:
                saved = prompted.costs.prompt_tokens - trained.costs.prompt_tokens
                compared.append(PromptingComparison(trained.name, prompted.name, comparisons, first, saved))
    return compared


def describe_missing_rival(models: "Sequence[ModelResult]", model_set: ModelSet) -> str | None:
    """How to score the base with a better prompt: where what a run trained is scored beside the base alone, and no
    evaluation of the run has done it. None elsewhere, and of documents, which have no prompts."""
    run, prepared = model_set.run, model_set.prepared
    kinds = {model.spec.kind for model in models if model.costs}
    trained = kinds & {"adapter", "merged", "model"}
    if run is None or prepared is None or not trained or "base" not in kinds:
        return None
    without_prompts = all(source.format in ("text", "tokens") for source in prepared.report.sources)
    documents = (read_json_object(file) or {} for file in run.evaluations.glob("*.json"))
    if (
        without_prompts
        or any(model.spec.prompting for model in models)
        or any(one.get("prompting") for one in documents)
    ):
        return None
    command = f"lorakit eval {shlex.quote(str(run.folder))} --few-shot 5"
    return f"no prompt with examples has been scored on these rows; it may do as well as the training: {command}"


def chosen_prompting(
    recipe: Recipe | None, few_shot: int | None, choose: Choice | None, system: str | None
) -> Prompting | None:
    """What the options say, else `evaluate.baselines` of the recipe; None where that is nothing."""
    written = recipe.evaluate.baselines if recipe else Baselines()
    chosen = Prompting(
        written.few_shot if few_shot is None else few_shot,
        choose or written.choose,
        written.system if system is None else system,
        recipe.train.seed if recipe else 0,
    )
    return chosen if chosen.few_shot or chosen.system is not None else None


def add_prompted_model(model_set: ModelSet, prompting: Prompting) -> ModelSet:
    """The models and, after the base, the base asked in this way. UserError without a base, or without a run whose
    training rows could be examples."""
    specs = list(model_set.specs)
    at = next((at for at, spec in enumerate(specs) if spec.kind == "base"), None)
    if at is None:
        raise UserError("--few-shot and --system-file are for the base, and it is not scored. Add 'base'.")
    if prompting.few_shot and model_set.prepared is None:
        raise UserError("--few-shot: examples are training rows of a run, and none of these is a run. Add one.")
    base = specs[at]
    specs.insert(at + 1, replace(base, name=f"{base.name} + {prompting}", prompting=prompting))
    return replace(model_set, specs=tuple(specs))


def add_prompts(
    whole: Sequence[RenderedRows], model_set: ModelSet, file: Path | GivenRows | None, progress: Progress
) -> list[RenderedRows]:
    """The renderings, of which that of a prompted model has its system text and examples in every prompt: only what
    follows them is scored. A row without an answer, or whose messages no prompt can be made of, stays as it is."""
    return [
        rendered if spec.prompting is None else _prompted(rendered, spec, spec.prompting, model_set, file, progress)
        for spec, rendered in zip(model_set.specs, whole, strict=True)
    ]


def _prompted(
    rendered: RenderedRows,
    spec: EvalModelSpec,
    prompting: Prompting,
    model_set: ModelSet,
    file: Path | GivenRows | None,
    progress: Progress,
) -> RenderedRows:
    template = row_template(rendered.tokenizer, spec.prepared, model_set.prepared)
    places = {rendered.rows[at]["where"] for at in rendered.with_answer}
    conversations = read_conversations(data_section(model_set, file)[0], template, places, progress)
    questions, starts = dict[int, tuple[TemplatedRow, int, Mapping[str, Any]]](), dict[int, int]()
    every = replace(rendered, turns="all")  # the loss is of all trained turns, whichever of them are generated
    for (at, start), tokens, reference in zip(every.answers, every.prompts, every.references, strict=True):
        conversation = conversations.get(rendered.rows[at]["where"])
        if conversation and at not in starts:  # of several answers the prompt of the first begins those of the others
            starts[at], answer = start, answer_to(conversation, tokens, reference)
            if answer:
                questions[at] = conversation, *answer
    if not questions:
        raise UserError(
            f"{spec.name}: none of the rows is a conversation, before which a system text or examples could stand. "
            "Leave --few-shot and --system-file out."
        )
    shots = _shots(prompting, questions, rendered.turns, model_set, progress)
    if others := len({*rendered.with_answer}) - len(questions):
        progress.warn(f"{spec.name}: {others:,} rows are asked as they are: they are not conversations")
    rows, refused = list(rendered.rows), list[RowError]()
    for at, (row, end, variables) in questions.items():
        own = list(row.messages[:end])
        system = own[:1] if own[0]["role"] == "system" else []
        if prompting.system is not None:
            system = [{"role": "system", "content": prompting.system}]
        messages = [*system, *shots[at], *(message for message in own if message["role"] != "system")]
        longer = replace(row, messages=[*messages, row.messages[end]], inserted=0, _written={})
        try:
            text = longer.write(len(messages), ask=True, variables=variables or None)
        except RowError as error:
            refused.append(error)
            continue
        prompt = list(rendered.tokenizer(text, add_special_tokens=False)["input_ids"])
        rows[at] = _with_prompt(rows[at], starts[at], prompt)
    if len(refused) == len(questions):
        raise UserError(f"{spec.name}: the chat template refuses every such prompt: {first_line(refused[0])}.")
    if refused:
        what = f"the chat template refuses a longer prompt ({first_line(refused[0])})"
        progress.warn(f"{spec.name}: {len(refused):,} rows are asked as they are: {what}")
    return replace(rendered, rows=rows)


def _with_prompt(row: Mapping[str, Any], start: int, prompt: list[int]) -> dict[str, Any]:
    """A row with another prompt before the answer that begins at `start`."""
    tail, labels = list(row["input_ids"][start:]), list(row["labels"][start:])
    ids = {"input_ids": prompt + tail, "labels": [IGNORED] * len(prompt) + labels}
    return {**row, **ids, "answer": row["answer"] - start + len(prompt)}


def _shots(
    prompting: Prompting,
    questions: Mapping[int, tuple[TemplatedRow, int, Mapping[str, Any]]],
    turns: Turns,
    model_set: ModelSet,
    progress: Progress,
) -> dict[int, list[Message]]:
    """The examples before each of some questions, as messages, by the question's number. A training row that is scored
    too is none: it would tell its own answer."""
    if not prompting.few_shot:
        return {at: [] for at in questions}
    prepared = model_set.prepared
    assert prepared is not None
    try:
        train, section = prepared.rows.train, prepared.rows.section
    except UserError as error:
        raise UserError(f"--few-shot: examples are training rows, and they cannot be read: {error}") from error
    template = row_template(prepared.tokenizer, prepared, prepared)
    places = {row["where"] for row in train.rows}
    pool = list(read_conversations(section.model_copy(update={"eval": None}), template, places, progress).values())
    scored = {json.dumps(_turns(row)) for row, _, _ in questions.values()}
    pool = [row for row in pool if row.messages and row.messages[-1]["role"] == "assistant"]
    pool = [row for row in pool if json.dumps(_turns(row)) not in scored]
    if len(pool) < prompting.few_shot:
        raise UserError(
            f"--few-shot: {prompting.few_shot} examples are asked for, and the training rows have "
            f"{counted(len(pool), 'conversation')} beside those that are scored. Ask for fewer."
        )
    shown = [_turns(row) for row in pool]
    if prompting.choose == "seed":
        drawn = random.Random(prompting.seed).sample(range(len(pool)), prompting.few_shot)
        same = [message for number in drawn for message in shown[number]]
        return dict.fromkeys(questions, same)
    ends = (end if turns == "all" else _last_answer(row) for row, end, _ in questions.values())
    texts = (_text(row.messages[:end]) for (row, _, _), end in zip(questions.values(), ends, strict=True))
    nearest = _nearest([_text(row.messages[:-1]) for row in pool], texts, prompting.few_shot)
    # The nearest one stands last, beside the question.
    return {
        at: [message for number in reversed(numbers) for message in shown[number]]
        for at, numbers in zip(questions, nearest, strict=True)
    }


def _last_answer(row: TemplatedRow) -> int:
    return max(at for at, message in enumerate(row.messages) if message["role"] == "assistant")


def _turns(row: TemplatedRow) -> list[Message]:
    return [message for message in row.messages if message["role"] != "system"]


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def _nearest(pool: Sequence[str], questions: Iterator[str], count: int) -> list[list[int]]:
    """Of each question the numbers of the texts nearest to it, by the cosine of their words' TF-IDF; nearest first."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\w+", sublinear_tf=True)
    try:
        known = vectorizer.fit_transform(pool)
    except ValueError as error:  # not one word in all of them
        raise UserError("--few-shot-by similar: the training rows have no words. Write --few-shot-by seed.") from error
    similar = (vectorizer.transform(questions) @ known.T).toarray()
    return [np.argsort(-row, kind="stable")[:count].tolist() for row in similar]
