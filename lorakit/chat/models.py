"""Who answers: what every model of a chat can do, and the models that write prompts and read answers as tokens."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

from lorakit.chat.answer_text import AnswerText, TokenText, token_texts
from lorakit.chat.interrupt import StopPressed
from lorakit.data.answers import until_stop
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.rows import Conversation, Message, RowError, refuse_half_characters
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.rendering import tokens_of_prompt, write_prompt
from lorakit.hardware.memory import OutOfMemory, free_memory, within_memory
from lorakit.progress import Progress

Ending = Literal["stop", "length", "context", "stopped"]
"""How an answer ended: by the model, at the most tokens that were allowed, at the model's last position, by Ctrl-C."""
Show = Callable[[str, bool], None]
"""Gets each piece of an answer as it comes, and whether it is part of a thought."""
Check = Callable[[], None]
"""Called at every token: raises StopPressed where the user stopped the answer."""


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen. At temperature 0 always the most likely token; above it tokens are drawn, from `seed`."""

    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 512


@dataclass(frozen=True)
class ChatAnswer:
    """What a model answered. `thinking`: what it wrote before. Counts are None where they are not known."""

    model: str
    text: str
    thinking: str
    ended: Ending
    prompt_tokens: int | None
    tokens: int | None
    seconds: float


class ChatModel(Protocol):
    """One model of a chat. `system`: the system prompt that it was trained with, if any."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def system(self) -> str | None:
        """The system prompt that it was trained with."""

    @property
    def describes(self) -> str:
        """What it is, in a few words."""

    def load(self) -> None:
        """Make it ready to answer."""

    def answer(self, messages: Sequence[Message], decoding: Decoding, show: Show, check: Check) -> ChatAnswer:
        """Answer the last message. Ctrl-C ends it early, and what came until then is the answer."""

    def prompt_texts(self) -> list[TokenText]:
        """The tokens that it got for its last answer."""


class Engine(Protocol):
    """What computes a model's next tokens."""

    def load(self) -> None:
        """Bring the model into memory."""

    def generate(
        self,
        prompt: list[int],
        stop_ids: Sequence[int],
        most: int,
        decoding: Decoding,
        receive: Callable[[int], None],
    ) -> None:
        """Give each token that follows the prompt to `receive`: `most` of them, or up to and with one of `stop_ids`."""


@dataclass
class TokenModel:
    """A model whose prompt is written here, by the chat template of its training. `limit`: its positions, if known."""

    name: str
    describes: str
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    limit: int | None
    engine: Engine
    progress: Progress
    _prompt: list[int] = field(default_factory=list, init=False, repr=False)

    @property
    def system(self) -> str | None:
        return self.template.system

    def load(self) -> None:
        self.engine.load()

    def prompt_texts(self) -> list[TokenText]:
        return token_texts(self._prompt, self.template.tokenizer)

    def answer(self, messages: Sequence[Message], decoding: Decoding, show: Show, check: Check) -> ChatAnswer:
        text = self._write(messages)
        prompt = tokens_of_prompt(text, self.template)
        room = self._room(prompt)
        self._prompt = prompt
        answer, tokens, start = AnswerText(self.template, text), list[int](), time.monotonic()

        def receive(token: int) -> None:
            tokens.append(token)
            check()
            _show_both(answer.new_pieces(until_stop(tokens, self.stop_ids)), show)

        most, stopped = min(decoding.max_new_tokens, room), False
        try:
            work = partial(self.engine.generate, prompt, self.stop_ids, most, decoding, receive)
            if isinstance(within_memory(work), OutOfMemory):
                free_memory()
                raise LorakitError(
                    f"out of memory on a conversation of {len(prompt) + len(tokens):,} tokens. Begin a new one with "
                    "/clear, or close other programs."
                )
        except StopPressed:
            stopped = True
        whole = until_stop(tokens, self.stop_ids)
        ending: Ending = "length" if most == decoding.max_new_tokens else "context"
        ended: Ending = "stop" if len(whole) < len(tokens) else "stopped" if stopped else ending
        _show_both(answer.rest(whole, ended == "stop"), show)
        thought, reply = answer.parts(whole, ended == "stop")
        seconds = time.monotonic() - start
        return ChatAnswer(self.name, reply, thought.strip(), ended, len(prompt), len(whole), seconds)

    def _write(self, messages: Sequence[Message]) -> str:
        """The prompt. An earlier thought is left out where the template writes none. A UserError where the template
        does not take the messages, or where what the user wrote has its marks."""
        for message in messages:
            mark = next((mark for mark in sorted(self.template.marks) if mark in message["content"]), None)
            if mark and message["role"] != "assistant":
                what = "the system prompt" if message["role"] == "system" else "a question"
                raise UserError(
                    f"{what} contains {mark!r}, which {self.name} reads as a mark of its chat template. Nothing was "
                    "sent: write it without such marks."
                )
        for what, _ in self.template.controls.spelled(Conversation(list(messages[-1:]))):
            self.progress.warn(f"{self.name}: {what}")
        adapted = [
            {key: value for key, value in message.items() if key != "thinking"}
            if "thinking" in message and not self.template.writes_thoughts(message)
            else message
            for message in messages
        ]
        try:
            for message in messages:
                refuse_half_characters(message["content"])
            return write_prompt(adapted, replace(self.template, system=None))
        except RowError as error:
            raise UserError(f"{self.name}: {error}. Nothing was sent.") from error

    def _room(self, prompt: Sequence[int]) -> int:
        """The most tokens that fit after the prompt; the last one needs no position."""
        if self.limit is None:
            return 1 << 30
        if len(prompt) > self.limit:
            raise UserError(
                f"{self.name}: the context is full: the conversation takes {len(prompt):,} tokens, and the model has "
                f"{self.limit:,} positions. Nothing was sent. Begin a new conversation with /clear."
            )
        return self.limit + 1 - len(prompt)


def _show_both(pieces: tuple[str, str], show: Show) -> None:
    thought, answer = pieces
    if thought:
        show(thought, True)
    if answer:
        show(answer, False)
