"""Chat templates: messages -> the text that a model reads, and what is found out of a template by samples."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar

from jinja2 import TemplateSyntaxError

from lorakit.data.chat_template import template_probe as probe
from lorakit.data.chat_template import watched
from lorakit.data.chat_template.controls import ControlTexts, find_control_texts, select_single_tokens
from lorakit.data.chat_template.renderer import Renderer
from lorakit.data.chat_template.template_probe import CallForm, TemplateMessage, Write
from lorakit.data.chat_template.thoughts import ThoughtFormat, find_thoughts
from lorakit.data.conversations import Message
from lorakit.data.rows import RowError
from lorakit.data.template_source import TemplateVariables, as_yaml, clock_at, find_variables
from lorakit.errors import UserError


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, rendered in the sandbox that transformers provides."""

    tokenizer: Any
    train_on: str = "assistant"
    system: str | None = None
    stop_words: tuple[str, ...] = field(default=(), compare=False)
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    """The day that the template takes for today, where it writes one; None is the day on which it is rendered."""
    seeks_remedies: ClassVar[bool] = True
    """Whether it is looked for what would help against an error."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found out on the way: compiled templates cannot be handed to another process."""
        return {named.name: getattr(self, named.name) for named in fields(self)}

    def adapt(self, message: Message) -> TemplateMessage:
        """A message in the form that the template reads.

        Raises:
            RowError: it has tool calls or thinking, and the template writes none.
        """
        if len(message) == 2:
            return message
        told = {
            key: value
            for key, value in message.items()
            if key not in ("train", "thinking", "begun") and value is not None
        }
        if has_thinking(message):
            if not self._thinking_names and self.thoughts is None:
                raise RowError(
                    "the chat template does not write thinking (write it into the content, leave it out, or give "
                    "another model.chat_template)"
                )
            told |= dict.fromkeys(self._thinking_names, message["thinking"])
        if not told.get("tool_calls"):
            told.pop("tool_calls", None)
            return told
        if self._call_form is None:
            raise RowError(
                "the chat template does not write tool calls (write them into the content, leave them out, or give "
                "another model.chat_template)"
            )
        return self._call_form.adapt(told)

    def write(
        self,
        told: list[TemplateMessage],
        ask: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The template's text of these messages; with `ask`, up to where the next answer begins.

        `variables`: what it is given besides the recipe's own.

        Raises:
            RowError: the template does not take them.
            UserError: the template is no valid Jinja, or there is none.
        """
        if roles := self._roles_in_parts:
            told = [probe.as_parts(message, roles) for message in told]
        return self._renderer.write(told, ask, tools, variables)

    @cached_property
    def values(self) -> dict[str, Any]:
        """What the template is given besides the conversation: the recipe's variables, and the clock of its day."""
        return {**self.variables, **({"strftime_now": clock_at(self.date)} if self.date else {})}

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.values)

    @cached_property
    def notes_every_look(self) -> bool:
        """Whether the template looks into no content unseen (`watched.py`)."""
        try:
            compiled, _ = self._renderer.without_tools
        except TemplateSyntaxError:
            return False  # said where it is rendered
        return watched.notes_every_look(compiled.environment, self._renderer.source)

    @cached_property
    def skeletons(self) -> dict[Any, Any]:
        """What is known of conversations by their shape (`skeletons.py`)."""
        return {}

    @cached_property
    def ends(self) -> frozenset[str]:
        """The texts of the tokens at which the model is known to end an answer."""
        return frozenset(word for word in (self.tokenizer.eos_token, *self.stop_words) if word)

    @cached_property
    def stops(self) -> frozenset[str]:
        """The texts of all tokens that end a turn."""
        ended = probe.find_answer_stops(self.write, self.ends, self._special)
        form = self._call_form
        return ended if form is None else probe.find_call_stops(self._write_calls, form, ended, self._special)

    @cached_property
    def stop(self) -> re.Pattern[str]:
        """Any of `stops`."""
        return probe.compile_alternation(self.stops)

    @cached_property
    def beginning(self) -> str | None:
        """The text of the beginning of sequence, where the tokenizer reads it in a text as that token."""
        word: str | None = self.tokenizer.bos_token
        return word if word and select_single_tokens(self.tokenizer, {word}) else None

    @cached_property
    def marks(self) -> frozenset[str]:
        """The texts that no message may contain: all that end a turn, and the beginning of sequence."""
        return self.stops | {mark for mark in (self.beginning, self.controls.front) if mark}

    @cached_property
    def looked_for(self) -> frozenset[str]:
        """The texts that are looked for in each message: `marks`, and the marks of thoughts."""
        return self.marks | ({self.thoughts.opens, self.thoughts.closes} if self.thoughts else set())

    @cached_property
    def controls(self) -> ControlTexts:
        """What no text of a row should spell."""
        return find_control_texts(self.tokenizer, self.write if self.tokenizer.chat_template else None, self.adapt)

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What the template writes before and behind the text of an answer, between the prompt and the stop."""
        if self.without_thoughts:
            write: Write = partial(self.write, variables=self.without_thoughts)
            return probe.find_frame(write, self.stop, self._answer_follower, "")
        if self.thoughts is None or not self.thoughts.opened:
            return probe.find_frame(self.write, self.stop, self._answer_follower, "")
        before, behind = probe.find_frame(self.write, self.stop, self._answer_follower, self.thoughts.tail)
        return (self.thoughts.written("", before) if self.thoughts.tail else before), behind

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The tokens that the tokenizer itself puts before a plain text."""
        whole, bare = (list(self.tokenizer("a", add_special_tokens=asked)["input_ids"]) for asked in (True, False))
        starts = (at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare)
        return tuple(whole[: next(starts, 0)])

    def ended(self, text: str, start: int, calls: bool) -> tuple[str, re.Match[str] | None]:
        """The text of a last turn that begins at `start`, with the stop that ends it, wherever that comes from."""
        stop = self.stop.search(text, start)
        if stop is None:
            text += self._call_follower if calls else self._answer_follower
            stop = self.stop.search(text, start)
        return text, stop

    @cached_property
    def _answer_follower(self) -> str:
        return probe.find_following_stop(self.write, None, probe.compile_alternation(self.ends))

    @cached_property
    def _call_follower(self) -> str:
        return probe.find_following_stop(self._write_calls, self._call_form, probe.compile_alternation(self.ends))

    @cached_property
    def _call_form(self) -> CallForm | None:
        return probe.find_call_form(self._write_calls)

    @cached_property
    def _thinking_names(self) -> tuple[str, ...]:
        return self._names_of_answers or self._names_of_calls

    @cached_property
    def _names_of_answers(self) -> tuple[str, ...]:
        return probe.find_thinking_names(self.write, probe.sample_answer())

    @cached_property
    def _names_of_calls(self) -> tuple[str, ...]:
        form = self._call_form
        return probe.find_thinking_names(self._write_calls, form.adapt(probe.sample_call())) if form else ()

    def apart(self, messages: list[Message]) -> list[Message]:
        """Messages whose texts have thoughts in them (between the template's own marks) with these apart, where the
        template writes the thoughts of such answers: it may write an empty one in front of them otherwise."""
        thoughts = self.thoughts if self.tokenizer.chat_template else None
        if thoughts is None or not any(thoughts.closes in message["content"] for message in messages):
            return messages
        return [
            thoughts.told_apart(message)
            if message["role"] == "assistant" and thoughts.inside(message) and self.writes_thoughts(message)
            else message
            for message in messages
        ]

    def writes_thoughts(self, message: Message) -> bool:
        """Whether the template writes the thought of such an answer."""
        return bool(self._names_of_calls if message.get("tool_calls") else self._names_of_answers)

    @cached_property
    def thoughts(self) -> ThoughtFormat | None:
        """How thoughts stand before answers; None where the template knows none."""
        answers = self._names_of_answers
        form, calls = (None, ()) if answers else (self._call_form, self._names_of_calls)
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        known = "\n".join((self._renderer.source, *added))
        return find_thoughts(self._write_calls if form else self.write, answers, form, calls, known)

    @cached_property
    def without_thoughts(self) -> dict[str, Any]:
        """The variable with which the prompt opens no thought, where it otherwise opens one that the text of an answer
        without a thought does not have; empty where there is none."""
        if probe.follows_prompt(self.write):
            return {}
        tried = (
            one for one in self.reads.to_try(self.variables) if probe.follows_prompt(partial(self.write, variables=one))
        )
        return next(tried, {})

    @cached_property
    def note_without_thoughts(self) -> str:
        """What is to be said of rows that are trained with `without_thoughts`."""
        return (
            "answers without thinking are trained behind the prompt that the chat template writes with "
            f"{as_yaml(self.without_thoughts)}: ask the model in the same way"
        )

    @cached_property
    def remedies(self) -> dict[str, str]:
        """What would help against an error, by its reason (`answers.py`)."""
        return {}

    @cached_property
    def reads(self) -> TemplateVariables:
        """The variables that the template reads."""
        compiled, known = self._renderer.without_tools
        given = frozenset({"messages", "tools", "documents", "add_generation_prompt", *known})
        sources = {self._renderer.source, str(self.tokenizer.get_chat_template(tools=[probe.TOOL]))}
        return find_variables(compiled.environment, sorted(sources), given)

    def check_variables(self) -> None:
        """Refuse variables of the recipe that the template does not read, and values with which it fails.

        Raises:
            UserError: there is one, or the template is none.
        """
        if not self.variables:
            return
        if not self.tokenizer.chat_template:
            raise UserError(
                "model.template_variables: the base has no chat template that would read them. Leave the key out, or "
                "give a template with model.chat_template."
            )
        self.reads.check(self.variables)
        for messages, _ in probe.render_samples(replace(self, variables={}).write, probe.sample_answer()):
            try:
                self.write(messages)
            except RowError as error:
                said = as_yaml(self.variables)
                raise UserError(f"model.template_variables: {said}: {error}. Write other values.") from error

    @cached_property
    def _roles_in_parts(self) -> frozenset[str]:
        return probe.find_roles_in_parts(self._renderer.write)

    @cached_property
    def _write_calls(self) -> Write:
        """Some tokenizers have a template of its own for conversations with tools."""
        return partial(self.write, tools=[probe.TOOL]) if isinstance(self.tokenizer.chat_template, dict) else self.write

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Any special token, the longest that fits."""
        words = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return probe.compile_alternation(frozenset({*words, *self.tokenizer.all_special_tokens, *self.ends}))


def has_thinking(message: Message) -> bool:
    """Whether there is thinking to be written."""
    return bool((message.get("thinking") or "").strip())
