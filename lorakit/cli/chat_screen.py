"""Where `lorakit chat` shows what happens: a terminal, a pipe, or the document of `--json`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit import console
from lorakit.amounts import counted

if TYPE_CHECKING:
    from lorakit.chat.answer_text import TokenText
    from lorakit.chat.models import ChatAnswer

_ENDINGS = {
    "length": "cut at the most tokens: /length allows more",
    "context": "cut where the model's positions end: /clear begins a new conversation",
    "stopped": "stopped",
}


class TerminalScreen:
    """Answers on standard output as they come, all else on standard error. `streams`: False shows an answer once it is
    complete, without its thought."""

    def __init__(self, streams: bool = True) -> None:
        self.streams = streams
        self._terminal = console.Terminal()
        self._open, self._thinks = False, False

    def say(self, text: str) -> None:
        self._terminal.say(text)

    def warn(self, text: str) -> None:
        self._end_line()
        self._terminal.warn(text)

    def label(self, name: str) -> None:
        console.result_label(name)

    def piece(self, text: str, thought: bool) -> None:
        if not self.streams:
            return
        if self._thinks and not thought:
            self._end_line()
        self._thinks = thought
        console.result_piece(text, dim=thought)
        self._open = not text.endswith("\n")

    def end_answer(self, answer: "ChatAnswer | None") -> None:
        self._end_line()
        self._thinks = False
        if answer is None:
            return
        if not self.streams:
            console.result_piece(answer.text.removesuffix("\n") + "\n")
            if note := _ENDINGS.get(answer.ended):
                self._terminal.warn(f"{answer.model}: {note}")
            return
        notes = [answer.model]
        if answer.tokens is not None:
            notes.append(counted(answer.tokens, "token"))
        notes += [f"{answer.seconds:.1f} s"]
        notes += [_ENDINGS[answer.ended]] if answer.ended in _ENDINGS else []
        notes += ["it answers nothing"] if answer.ended == "stop" and not answer.text.strip() else []
        console.aside(f"[{', '.join(notes)}]")

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        console.result_facts(rows)

    def tokens(self, texts: "Sequence[TokenText]") -> None:
        console.result_tokens([(one.text, one.special) for one in texts])
        count, special = sum(one.tokens for one in texts), sum(one.special for one in texts)
        self.say(f"{counted(count, 'token')}, {special:,} of them special")

    def _end_line(self) -> None:
        if self._open:
            console.result_piece("\n")
        self._open = False


class DocumentScreen(TerminalScreen):
    """Keeps what would be shown for the document of `--json`."""

    def __init__(self) -> None:
        super().__init__(streams=False)
        self.token_texts: list[list[dict[str, object]]] = []

    def label(self, name: str) -> None:
        pass

    def end_answer(self, answer: "ChatAnswer | None") -> None:
        pass

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        for name, fact in rows:
            self.say(f"{name}: {fact}")

    def tokens(self, texts: "Sequence[TokenText]") -> None:
        self.token_texts.append([{"text": one.text, "special": one.special, "tokens": one.tokens} for one in texts])
