"""A model behind an OpenAI-compatible server: it writes the prompt itself, from the messages."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from lorakit.chat.answer_text import TokenText
from lorakit.chat.interrupt import StopPressed
from lorakit.chat.models import ChatAnswer, Check, Decoding, Ending, Show
from lorakit.data.answers import after_thought
from lorakit.data.chat_prompts import ChatPrompt
from lorakit.data.rows import Message
from lorakit.errors import LorakitError, UserError
from lorakit.model.endpoint import Endpoint
from lorakit.model.endpoint_requests import stream_events

_CHAT = "/chat/completions"
_THOUGHTS = ("reasoning_content", "reasoning")
"""The parts of a message in which servers put thoughts: llama.cpp, SGLang and DeepSeek; vLLM since 0.12."""


@dataclass
class EndpointModel:
    """A served model. `variables` of its chat template, and `tokenizer`: those of the run beside it, if any."""

    name: str
    endpoint: Endpoint
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    _prompt_tokens: int | None = field(default=None, init=False)

    @property
    def describes(self) -> str:
        return f"{self.endpoint.model} of {self.endpoint.url}"

    def load(self) -> None:
        """Nothing is to be loaded here."""

    def prompt_texts(self) -> list[TokenText]:
        count = f": {self._prompt_tokens:,} tokens by its own count" if self._prompt_tokens is not None else ""
        raise UserError(f"/tokens: {self.name} writes its prompt on the server, which does not show it{count}.")

    def answer(self, messages: Sequence[Message], decoding: Decoding, show: Show, check: Check) -> ChatAnswer:
        reply, start, stopped = _Reply(), time.monotonic(), False
        try:
            events = stream_events(self.endpoint.address, _CHAT, self._request(messages, decoding))
            with closing(events):
                for event in events:
                    check()
                    for text, thought in reply.add(event):
                        show(text, thought)
        except StopPressed:
            stopped = True
        self._prompt_tokens = reply.usage.get("prompt_tokens")
        if not stopped and not reply.answered:
            raise LorakitError(f"{self.endpoint.url}: the server answers without a choice. Look at its log.")
        text, thinking = reply.text, reply.thought
        if self.tokenizer and (after := after_thought(text, self.tokenizer)) is not None:
            text, thinking = after.lstrip(), thinking or text.removesuffix(after)
        ended: Ending = "stopped" if stopped else "length" if reply.finish == "length" else "stop"
        counts = (self._prompt_tokens, reply.usage.get("completion_tokens"))
        return ChatAnswer(self.name, text, thinking.strip(), ended, *counts, time.monotonic() - start)

    def _request(self, messages: Sequence[Message], decoding: Decoding) -> dict[str, Any]:
        """Without stop tokens, which the server has to know, as in `lorakit eval`."""
        request = {"model": self.endpoint.model, **ChatPrompt(list(messages), None, dict(self.variables)).to_openai()}
        request |= {"temperature": decoding.temperature, "max_tokens": decoding.max_new_tokens, "seed": decoding.seed}
        return request | {"stream": True, "stream_options": {"include_usage": True}}


@dataclass
class _Reply:
    """What came of an answer so far."""

    text: str = ""
    thought: str = ""
    finish: str | None = None
    answered: bool = False
    usage: dict[str, int] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """The new pieces in an event, thoughts marked; parts of other kinds than the interface has are passed over."""
        usage, choices = event.get("usage"), event.get("choices")
        if isinstance(usage, dict):
            self.usage = {key: value for key, value in usage.items() if isinstance(value, int)}
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return []
        self.finish = choice.get("finish_reason") or self.finish
        message = choice.get("delta") or choice.get("message")
        self.answered = True
        if not isinstance(message, dict):
            return []
        thought = next((message[key] for key in _THOUGHTS if isinstance(message.get(key), str)), "")
        text = message["content"] if isinstance(message.get("content"), str) else ""
        self.thought, self.text = self.thought + thought, self.text + text
        return [pair for pair in ((thought, True), (text, False)) if pair[0]]
