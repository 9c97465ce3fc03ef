"""Chat templates: messages -> the text that a model reads, written within bounds of time and memory; what a template
does with samples tells how it writes answers, calls and thoughts."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar

from jinja2 import Template, TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from lorakit.bounds import TooLong, bounded
from lorakit.data.chat_template import template_probe as probe
from lorakit.data.chat_template.controls import ControlTexts, find_control_texts, select_single_tokens
from lorakit.data.chat_template.template_probe import AnswerProbe, TemplateMessage, ThoughtFormat
from lorakit.data.rows import Message, RowError
from lorakit.data.template_source import TemplateVariables, as_yaml, clock_at, compile_bounded, find_variables
from lorakit.data.template_tokens import is_single_token, usable_templates
from lorakit.errors import UserError

_SECONDS, _MEMORY = 10, 2 << 30  # a template writes a conversation in milliseconds
# Characters that it may write besides what the messages say, and how often it may write that (as JSON, with thoughts).
_AROUND, _TIMES = 1 << 20, 8
REFUSED = "the chat template refuses the conversation"
_FIX = "Fix the template, or write another."
_NO_TEMPLATE = "model.base: it has no chat template, which conversations need."
_OWN_TEMPLATE = (
    "a .jinja file such as {% for m in messages %}{{ m['content'] + ('\\n' if m['role'] != 'assistant' else eos_token) "
    "}}{% endfor %}, or train documents (data.format: text)."
)


class NoChatTemplate(UserError):
    """Conversations are to be rendered, and the model has no chat template."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, rendered in the sandbox that transformers provides. `date`: the day that it takes
    for today, where it writes one; None is the day on which it is rendered."""

    tokenizer: Any
    train_on: str = "assistant"
    system: str | None = None
    stop_words: tuple[str, ...] = field(default=(), compare=False)
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    skeletons: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What is known of conversations by their shape (`skeletons.py`)."""
    remedies: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What would help against an error, by its reason (`render.py`)."""
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
        if probe.has_thinking(message):
            names = self._plain.thinking_names or self._calling.thinking_names
            if not names and self.thoughts is None:
                raise _not_written("thinking", "it")
            adapted |= dict.fromkeys(names, message["thinking"])
        if not adapted.get("tool_calls"):
            adapted.pop("tool_calls", None)
            return adapted
        if self._calling.form is None:
            raise _not_written("tool calls", "them")
        return self._calling.form.adapt(adapted)

    def write(
        self,
        messages: list[TemplateMessage],
        ask: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        roles_in_parts: frozenset[str] | None = None,
    ) -> str:
        """The template's text of these messages; with `ask`, up to where the next answer begins. `variables`: given
        besides the recipe's own. `roles_in_parts`: None for those that the template wants so. A RowError where it does
        not take the messages; a UserError where it is not valid Jinja, does not end, or there is none."""
        if roles := self._roles_in_parts if roles_in_parts is None else roles_in_parts:
            messages = [probe.as_parts(message, roles) for message in messages]
        try:
            with bounded(_SECONDS, _MEMORY):
                compiled, known = self._compiled_for_tools if tools else self.compiled
                given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": ask}
                clock: dict[str, Any] = {"strftime_now": clock_at(self.date)} if self.date else {}
                given = {**known, **self.variables, **clock, **(variables or {}), **given}
                # As Template.render does it, without gathering the names that every template knows anew each time.
                text = "".join(compiled.root_render_func(compiled.new_context(given, shared=True)))
                size = len(json.dumps([messages, tools], default=str)) if len(text) > _AROUND else 0
        except (TooLong, MemoryError) as error:
            limit = f"{_SECONDS} s" if isinstance(error, TooLong) else f"{_MEMORY >> 30} GiB of memory"
            what = f"it takes more than {limit} to write {len(messages)} messages, and may never end"
            raise UserError(f"model.chat_template: {what}. {_FIX}") from error
        except TemplateSyntaxError as error:
            what = f"not valid Jinja: {error.message}, line {error.lineno}"
            raise UserError(f"model.chat_template: {what}. {_FIX}") from error
        except TemplateError as error:
            raise RowError(REFUSED, str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise RowError("the chat template fails", f"{type(error).__name__}: {error}") from error
        if len(text) > _AROUND + _TIMES * size:
            raise UserError(f"model.chat_template: it writes {len(text):,} characters for messages of {size:,}. {_FIX}")
        return text

    @property
    def source(self) -> str:
        """The text of the template for conversations without tools."""
        return str(self.tokenizer.get_chat_template())

    @cached_property
    def compiled(self) -> tuple[Template, dict[str, Any]]:
        """The compiled template, and the values that it knows: transformers' functions and the special tokens."""
        return self._compile(None)

    @cached_property
    def _compiled_for_tools(self) -> tuple[Template, dict[str, Any]]:
        return self._compile([probe.TOOL])  # some tokenizers have a second template for conversations with tools

    def _compile(self, tools: list[dict[str, Any]] | None) -> tuple[Template, dict[str, Any]]:
        if not self.tokenizer.chat_template:
            names = ", ".join(getattr(self.tokenizer, "named_templates", ()))
            others = f" Its tokenizer has {names}, and no default: put one of these into a file." if names else ""
            usable = usable_templates(partial(is_single_token, self.tokenizer), bool(self.tokenizer.eos_token))
            named = f"one of {', '.join(usable)}, whose tokens it has, or " if usable else ""
            raise NoChatTemplate(f"{_NO_TEMPLATE} Give one with model.chat_template: {named}{_OWN_TEMPLATE}{others}")
        source = self.tokenizer.get_chat_template(tools=tools)
        if "*" in source:  # never compiled without these bounds: jinja computes constants while it compiles
            compiled = compile_bounded(_compile_jinja_template("").environment, source)
        else:
            compiled = _compile_jinja_template(source)
        return compiled, {**compiled.globals, **self.tokenizer.special_tokens_map}

    @cached_property
    def ends(self) -> frozenset[str]:
        """The texts of the tokens at which the model is known to end an answer."""
        return frozenset(word for word in (self.tokenizer.eos_token, *self.stop_words) if word)

    @cached_property
    def stops(self) -> frozenset[str]:
        """The texts of all tokens that end a turn."""
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        pattern = probe.compile_alternation({*special, *self.tokenizer.all_special_tokens, *self.ends})
        return self._calling.find_stops(self._plain.find_stops(self.ends, pattern), pattern)

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
        thoughts, tail = self.thoughts, ""
        if thoughts and thoughts.opened and not self.without_thoughts:
            tail = thoughts.tail
        before, after = self._plain_with(self.without_thoughts).find_frame(self.stop, tail)
        return (thoughts.add("", before) if thoughts and tail else before), after

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The tokens that the tokenizer itself puts before a plain text."""
        whole, bare = (list(self.tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
        starts = (at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare)
        return tuple(whole[: next(starts, 0)])

    def find_stop(self, text: str, start: int, calls: bool) -> tuple[str, re.Match[str] | None]:
        """The text of a last turn that begins at `start`, and the stop that ends it, added where only the next message
        writes it."""
        stop = self.stop.search(text, start)
        if stop is None:
            text += (self._calling if calls else self._plain).following_stop
            stop = self.stop.search(text, start)
        return text, stop

    @cached_property
    def _plain(self) -> AnswerProbe:
        return AnswerProbe(self.write, probe.SAMPLE_ANSWER, probe.compile_alternation(self.ends))

    @cached_property
    def _calling(self) -> AnswerProbe:
        several = isinstance(self.tokenizer.chat_template, dict)
        write = partial(self.write, tools=[probe.TOOL]) if several else self.write
        return probe.probe_calls(write, probe.compile_alternation(self.ends))

    def _plain_with(self, variables: Mapping[str, Any]) -> AnswerProbe:
        return replace(self._plain, write=partial(self.write, variables=variables)) if variables else self._plain

    @cached_property
    def _roles_in_parts(self) -> frozenset[str]:
        return probe.find_roles_in_parts(self.write)

    def separate_thoughts(self, messages: list[Message]) -> list[Message]:
        """The messages with the thoughts in their texts (between the template's own marks) moved into `thinking`, where
        the template writes thoughts: it may write an empty one in front of them otherwise."""
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
        return bool((self._calling if message.get("tool_calls") else self._plain).thinking_names)

    @cached_property
    def thoughts(self) -> ThoughtFormat | None:
        """How thoughts stand before answers; None where the template knows none."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        only_before_calls = not self._plain.thinking_names and self._calling.thinking_names
        answers = self._calling if only_before_calls else self._plain
        return probe.find_thoughts(answers, "\n".join((self.source, *added)))

    @cached_property
    def without_thoughts(self) -> dict[str, Any]:
        """The variable with which the prompt opens no thought, where it otherwise opens one that the text of an answer
        without a thought lacks; or empty."""
        if self._plain.follows_prompts:
            return {}
        tried = self.reads.to_try(self.variables)
        return next((variables for variables in tried if self._plain_with(variables).follows_prompts), {})

    @cached_property
    def note_without_thoughts(self) -> str:
        """What the user is told of rows that are trained with `without_thoughts`."""
        prompt = f"the prompt that the chat template writes with {as_yaml(self.without_thoughts)}"
        return f"answers without thinking are trained after {prompt}: ask the model in the same way"

    @cached_property
    def reads(self) -> TemplateVariables:
        """The variables that the template reads."""
        compiled, known = self.compiled
        given = frozenset({"messages", "tools", "documents", "add_generation_prompt", *known})
        sources = {self.source, str(self.tokenizer.get_chat_template(tools=[probe.TOOL]))}
        return find_variables(compiled.environment, sorted(sources), given)

    def check_variables(self) -> None:
        """A UserError for variables of the recipe that the template does not read, and values with which it fails."""
        if not self.variables:
            return
        if not self.tokenizer.chat_template:
            what = "the base has no chat template that would read them"
            raise UserError(f"model.template_variables: {what}. Leave the key out, or write model.chat_template.")
        self.reads.check(self.variables)
        for sample in replace(self, variables={})._plain.samples:
            try:
                self.write(sample.messages)
            except RowError as error:
                key = f"model.template_variables: {as_yaml(self.variables)}"
                raise UserError(f"{key}: {error}. Write other values.") from error


def _not_written(what: str, it: str) -> RowError:
    remedy = f"write {it} into the content, leave {it} out, or give another model.chat_template"
    return RowError(f"the chat template does not write {what} ({remedy})")
