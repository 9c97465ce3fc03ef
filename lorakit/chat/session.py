"""A chat: the conversation so far, who answers, and how."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from lorakit.chat.answer_text import TokenText
from lorakit.chat.interrupt import StopKey
from lorakit.chat.models import ChatAnswer, ChatModel, Decoding
from lorakit.chat.saving import SavedFiles, Turn
from lorakit.data.rows import Message
from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest


class Screen(Protocol):
    """Where a chat shows what happens."""

    def say(self, text: str) -> None:
        """State one fact."""

    def label(self, name: str) -> None:
        """The answer of this model follows."""

    def piece(self, text: str, thought: bool) -> None:
        """Show a piece of an answer, or of the thought before it."""

    def end_answer(self, answer: ChatAnswer | None) -> None:
        """The answer is complete, or broken off by an error."""

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show named facts, such as commands with their meaning."""

    def tokens(self, texts: Sequence[TokenText]) -> None:
        """Show the tokens of a prompt."""


@dataclass
class ChatSession:
    """One chat. `system`: the system prompt that the user chose (empty: none); None is that of each model's training.
    `answers`: all that were given, with their questions, as `--json` has them."""

    models: Sequence[ChatModel]
    current: ChatModel
    decoding: Decoding
    screen: Screen
    system: str | None = None
    comparing: bool = False
    key: StopKey | None = None
    turns: list[Turn] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    files: SavedFiles = field(default_factory=SavedFiles)
    conversation: int = 0
    answered: ChatModel | None = None
    _draws: int = 0

    def system_of(self, model: ChatModel) -> str | None:
        return model.system if self.system is None else self.system

    def messages(self, model: ChatModel | None = None) -> list[Message]:
        """The conversation so far, with the system prompt that this model gets; of the current one by default."""
        system = self.system_of(model or self.current)
        before: list[Message] = [{"role": "system", "content": system}] if system else []
        return before + [message for turn in self.turns for message in turn.messages()]

    def ask(self, question: str, compare: bool | None = None) -> None:
        """Answer a question: by the current model, or by all where they are compared. The conversation goes on from the
        current model's answer."""
        models = self.models if (self.comparing if compare is None else compare) else [self.current]
        self._draws += 1
        decoding = replace(self.decoding, seed=self.decoding.seed + self._draws - 1)
        turn: Turn | None = None
        for model in models:
            if len(models) > 1:
                self.screen.label(model.name)
            answer = self._answer(model, question, decoding)
            if model is self.current and (answer.text or answer.thinking or answer.ended != "stopped"):
                turn = Turn(question, answer)
            if answer.ended == "stopped":
                break
        if turn is None:
            self.screen.say("no answer: the question is not part of the conversation")
            return
        self.turns.append(turn)

    def _answer(self, model: ChatModel, question: str, decoding: Decoding) -> ChatAnswer:
        def check() -> None:
            if self.key:
                self.key.check()

        messages = [*self.messages(model), {"role": "user", "content": question}]
        answer: ChatAnswer | None = None
        try:
            answer = model.answer(messages, decoding, self.screen.piece, check)
        finally:
            self.screen.end_answer(answer)
        self.answered = model
        self.answers.append({"question": question, "seed": decoding.seed, **asdict(answer)})
        return answer

    def retry(self, compare: bool | None = None) -> None:
        """Answer the last question again, instead of the last answer."""
        if not self.turns:
            raise UserError("there is no question to answer again yet.")
        last = self.turns.pop()
        before = len(self.turns)
        try:
            self.ask(last.question, compare)
        finally:
            if len(self.turns) == before:  # no new answer took its place
                self.turns.append(last)

    def switch(self, name: str) -> None:
        """Let another model answer; it is loaded at once."""
        model = self.find(name)
        model.load()
        self.current = model

    def find(self, name: str) -> ChatModel:
        by_name = {model.name: model for model in self.models}
        if name in by_name:
            return by_name[name]
        near = nearest(name, by_name, parts=True)
        remedy = f"Did you mean {near}?" if near else f"There are {', '.join(by_name)}."
        raise UserError(f"{name!r} is not a model of this chat. {remedy}")

    def decode(self, **changes: Any) -> None:
        """Change how answers are chosen; draws begin again from the seed."""
        self.decoding, self._draws = replace(self.decoding, **changes), 0

    def clear(self) -> None:
        """Begin a new conversation; the system prompt and all settings stay."""
        self.turns, self.conversation, self.answered, self._draws = [], self.conversation + 1, None, 0

    def document(self) -> dict[str, Any]:
        """The chat as `--json` prints it."""
        return {
            "models": [{"name": model.name, "is": model.describes} for model in self.models],
            "current": self.current.name,
            "decoding": asdict(self.decoding),
            "messages": self.messages(),
            "answers": self.answers,
        }
