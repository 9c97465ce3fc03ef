"""Chat templates: messages -> the text that a model reads, and what samples show of a template."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar

from lorakit.data.chat_template import template_probe as probe
from lorakit.data.chat_template.controls import ControlTexts, find_control_texts, select_single_tokens
from lorakit.data.chat_template.renderer import Renderer
from lorakit.data.chat_template.template_probe import CallForm, Sample, TemplateMessage, Write
from lorakit.data.chat_template.thoughts import ThoughtFormat, find_thoughts
from lorakit.data.conversations import Message
from lorakit.data.rows import RowError
from lorakit.data.template_source import TemplateVariables, as_yaml, clock_at, find_variables
from lorakit.errors import UserError


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, rendered in the sandbox that transformers provides.

    `date`: the day that the template takes for today, where it writes one; None is the day on which it is rendered.
    """

    tokenizer: Any
    train_on: str = "assistant"
    system: str | None = None
    stop_words: tuple[str, ...] = field(default=(), compare=False)
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    skeletons: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What is known of conversations by their shape (`skeletons.py`)."""
    remedies: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What would help against an error, by its reason (`answers.py`)."""
    seeks_remedies: ClassVar[bool] = True

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: compiled templates cannot be handed to another process."""
        return {named.name: getattr(self, named.name) for named in fields(self)}

    def adapt(self, message: Message) -> TemplateMessage:
        """A message in the form that the template reads; a RowError where it writes no tool calls or no thinking."""
        if len(message) == 2:
            return message
        ours = ("train", "thinking", "begun")
        adapted = {key: value for key, value in message.items() if key not in ours and value is not None}
        if has_thinking(message):
            names = self._answer_thinking_names or self._call_thinking_names
            if not names and self.thoughts is None:
                raise RowError(
                    "the chat template does not write thinking (write it into the content, leave it out, or give "
                    "another model.chat_template)"
                )
            adapted |= dict.fromkeys(names, message["thinking"])
        if not adapted.get("tool_calls"):
            adapted.pop("tool_calls", None)
            return adapted
        if self._call_form is None:
            raise RowError(
                "the chat template does not write tool calls (write them into the content, leave them out, or give "
                "another model.chat_template)"
            )
        return self._call_form.adapt(adapted)

    def write(
        self,
        messages: list[TemplateMessage],
        ask: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The template's text of these messages; with `ask`, up to where the next answer begins. `variables`: given
        besides the recipe's own.

        Raises:
            RowError: the template does not take them.
            UserError: the template is not valid Jinja, does not end, or there is none.
        """
        if roles := self._roles_in_parts:
            messages = [probe.as_parts(message, roles) for message in messages]
        return self.renderer.write(messages, ask, tools, variables)

    @cached_property
    def renderer(self) -> Renderer:
        """The compiled template, with the recipe's variables and the clock of its day."""
        clock = {"strftime_now": clock_at(self.date)} if self.date else {}
        return Renderer(self.tokenizer, {**self.variables, **clock})

    @cached_property
    def ends(self) -> frozenset[str]:
        """The texts of the tokens at which the model is known to end an answer."""
        return frozenset(word for word in (self.tokenizer.eos_token, *self.stop_words) if word)

    @cached_property
    def stops(self) -> frozenset[str]:
        """The texts of all tokens that end a turn."""
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        pattern = probe.compile_alternation({*special, *self.tokenizer.all_special_tokens, *self.ends})
        stops = probe.find_stops(self._samples, False, self.ends, pattern)
        return probe.find_stops(self._call_samples, True, stops, pattern)

    @cached_property
    def stop(self) -> re.Pattern[str]:
        """Any of `stops`."""
        return probe.compile_alternation(self.stops)

    @cached_property
    def beginning(self) -> str | None:
        """The beginning of sequence, where the tokenizer reads it in a text as that token."""
        word: str | None = self.tokenizer.bos_token
        return word if word and select_single_tokens(self.tokenizer, {word}) else None

    @cached_property
    def marks(self) -> frozenset[str]:
        """The texts that no message may contain: all that end a turn, and the beginning of sequence."""
        return self.stops | {mark for mark in (self.beginning, self.controls.front) if mark}

    @cached_property
    def marks_and_thoughts(self) -> frozenset[str]:
        """`marks`, and the marks of thoughts."""
        return self.marks | ({self.thoughts.opens, self.thoughts.closes} if self.thoughts else set())

    @cached_property
    def controls(self) -> ControlTexts:
        """What no text of a row should spell."""
        return find_control_texts(self.tokenizer, self.write if self.tokenizer.chat_template else None)

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What the template writes before and after the text of an answer, between the prompt and the stop."""
        thoughts, samples, tail = self.thoughts, self._samples, ""
        if self.without_thoughts:
            samples = probe.take_samples(partial(self.write, variables=self.without_thoughts), probe.SAMPLE_ANSWER)
        elif thoughts and thoughts.opened:
            tail = thoughts.tail
        before, after = probe.find_frame(samples, self.stop, self._after_answer, tail)
        return (thoughts.add("", before) if thoughts and tail else before), after

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The tokens that the tokenizer itself puts before a plain text."""
        whole, bare = (list(self.tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
        starts = (at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare)
        return tuple(whole[: next(starts, 0)])

    def find_stop(self, text: str, start: int, calls: bool) -> tuple[str, re.Match[str] | None]:
        """The text of a last turn that begins at `start`, and the stop that ends it; where only the next message would
        write a stop, the text gets it here."""
        stop = self.stop.search(text, start)
        if stop is None:
            text += self._after_call if calls else self._after_answer
            stop = self.stop.search(text, start)
        return text, stop

    @cached_property
    def _after_answer(self) -> str:
        return probe.find_following_stop(self.write, self._samples, False, probe.compile_alternation(self.ends))

    @cached_property
    def _after_call(self) -> str:
        ends = probe.compile_alternation(self.ends)
        return probe.find_following_stop(self._write_calls, self._call_samples, True, ends)

    @cached_property
    def _samples(self) -> list[Sample]:
        return probe.take_samples(self.write, probe.SAMPLE_ANSWER)

    @cached_property
    def _call_samples(self) -> list[Sample]:
        return probe.take_samples(self._write_calls, self._call_form.sample()) if self._call_form else []

    @cached_property
    def _call_form(self) -> CallForm | None:
        return probe.find_call_form(self._write_calls)

    @cached_property
    def _answer_thinking_names(self) -> tuple[str, ...]:
        return probe.find_thinking_names(self.write, probe.SAMPLE_ANSWER)

    @cached_property
    def _call_thinking_names(self) -> tuple[str, ...]:
        return probe.find_thinking_names(self._write_calls, self._call_form.sample()) if self._call_form else ()

    @cached_property
    def _roles_in_parts(self) -> frozenset[str]:
        return probe.find_roles_in_parts(self.renderer.write)

    @cached_property
    def _write_calls(self) -> Write:
        # Some tokenizers have a second template for conversations with tools.
        several = isinstance(self.tokenizer.chat_template, dict)
        return partial(self.write, tools=[probe.TOOL]) if several else self.write

    def separate_thoughts(self, messages: list[Message]) -> list[Message]:
        """The messages with the thoughts in their texts (between the template's own marks) moved into `thinking`, where
        the template writes the thoughts of such answers: it may write an empty one in front of them otherwise."""
        thoughts = self.thoughts if self.tokenizer.chat_template else None
        if thoughts is None or not any(thoughts.closes in message["content"] for message in messages):
            return messages
        separated = []
        for message in messages:
            if message["role"] == "assistant" and thoughts.is_inside(message) and self.writes_thoughts(message):
                thought, bare = thoughts.split(message)
                message = bare | {"thinking": thought} if thought else bare
            separated.append(message)
        return separated

    def writes_thoughts(self, message: Message) -> bool:
        """Whether the template writes the thought of such an answer."""
        return bool(self._call_thinking_names if message.get("tool_calls") else self._answer_thinking_names)

    @cached_property
    def thoughts(self) -> ThoughtFormat | None:
        """How thoughts stand before answers; None where the template knows none."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        known = "\n".join((self.renderer.source, *added))
        if not self._answer_thinking_names and self._call_thinking_names and self._call_form:
            return find_thoughts(self._write_calls, self._call_form.sample(), self._call_thinking_names, known)
        return find_thoughts(self.write, probe.SAMPLE_ANSWER, self._answer_thinking_names, known)

    @cached_property
    def without_thoughts(self) -> dict[str, Any]:
        """The variable with which the prompt opens no thought, where it otherwise opens one that the text of an answer
        without a thought does not have; empty where there is none."""
        if _follow_prompts(self._samples):
            return {}
        for variable in self.reads.to_try(self.variables):
            if _follow_prompts(probe.take_samples(partial(self.write, variables=variable), probe.SAMPLE_ANSWER)):
                return variable
        return {}

    @cached_property
    def note_without_thoughts(self) -> str:
        """What the user is told of rows that are trained with `without_thoughts`."""
        return (
            "answers without thinking are trained after the prompt that the chat template writes with "
            f"{as_yaml(self.without_thoughts)}: ask the model in the same way"
        )

    @cached_property
    def reads(self) -> TemplateVariables:
        """The variables that the template reads."""
        compiled, known = self.renderer.without_tools
        given = frozenset({"messages", "tools", "documents", "add_generation_prompt", *known})
        sources = {self.renderer.source, str(self.tokenizer.get_chat_template(tools=[probe.TOOL]))}
        return find_variables(compiled.environment, sorted(sources), given)

    def check_variables(self) -> None:
        """A UserError for variables of the recipe that the template does not read, and values with which it fails."""
        if not self.variables:
            return
        if not self.tokenizer.chat_template:
            raise UserError(
                "model.template_variables: the base has no chat template that would read them. Leave the key out, or "
                "give a template with model.chat_template."
            )
        self.reads.check(self.variables)
        for sample in replace(self, variables={})._samples:
            try:
                self.write(sample.messages)
            except RowError as error:
                key = f"model.template_variables: {as_yaml(self.variables)}"
                raise UserError(f"{key}: {error}. Write other values.") from error


def has_thinking(message: Message) -> bool:
    """Whether an answer has thinking other than white space."""
    return bool((message.get("thinking") or "").strip())


def _follow_prompts(samples: list[Sample]) -> bool:
    return all(sample.text.startswith(sample.prompt) for sample in samples)
