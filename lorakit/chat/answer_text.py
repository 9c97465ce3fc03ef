"""The text of an answer while its tokens come: whole characters only, the thought apart from the answer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lorakit.data.answers import decode_answer
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.chat_template.template_probe import ThoughtFormat, compile_alternation

_HALF = "\ufffd"
"""What a tokenizer writes for the bytes of a character that is not complete yet."""


class AnswerParts(NamedTuple):
    """What a model wrote before its answer, without the marks around it, and the answer."""

    thought: str
    answer: str


class AnswerText:
    """The text of one answer. `prompt`: the text that it follows, which may open a thought."""

    def __init__(self, template: ChatTemplate, prompt: str) -> None:
        self._tokenizer = template.tokenizer
        thoughts = template.thoughts
        here = thoughts.after_prompt(prompt) if thoughts else None
        self._thoughts: ThoughtFormat | None = here if here and not here.skips else None
        self._end = thoughts.after.strip() if thoughts else ""
        before = template.frame[0]
        self._front, self._space = before.strip(), before if before.isspace() else ""
        self._special = compile_alternation(template.tokenizer.all_special_tokens)
        self._shown = AnswerParts("", "")

    def parts(self, tokens: Sequence[int], ended: bool = False) -> AnswerParts:
        """What these tokens say; `ended`: the model ended them itself. `answer` is what `lorakit eval` makes of them,
        without the white space that the template itself writes before every answer. A thought that is not closed is no
        answer, unless the model ended there."""
        answer = decode_answer(tokens, self._tokenizer).removeprefix(self._space)
        thoughts = self._thoughts
        if not self._end:
            return AnswerParts("", answer)
        raw = str(self._tokenizer.decode(list(tokens)))
        thought, mark, _ = raw.rpartition(self._end)
        if mark:
            return AnswerParts(self._bare(thought), answer)
        if thoughts and not ended and (thoughts.opened or raw.lstrip().startswith(_beginning(thoughts))):
            return AnswerParts(self._bare(raw), "")
        return AnswerParts("", answer)

    def new_pieces(self, tokens: Sequence[int]) -> AnswerParts:
        """What these tokens add to what was given out before; what may still change is kept back."""
        raw = str(self._tokenizer.decode(list(tokens))) if self._end or self._front else ""
        for mark in (self._front, _beginning(self._thoughts) if self._thoughts else ""):
            if mark and mark.startswith(raw.strip()) and mark != raw.strip():
                return AnswerParts("", "")
        thought, answer = self.parts(tokens)
        answer = "" if self._space.startswith(answer) else answer
        whole = AnswerParts(_without_end_of(thought, self._end).rstrip(_HALF), answer.rstrip(_HALF))
        return self._new(whole)

    def rest(self, tokens: Sequence[int], ended: bool) -> AnswerParts:
        """What was kept back, now that no token follows."""
        return self._new(self.parts(tokens, ended))

    def _new(self, whole: AnswerParts) -> AnswerParts:
        """What `whole` adds, for each part: nothing where what was given out has turned out to be something else."""
        both = zip(whole, self._shown, strict=True)
        new = AnswerParts(*(text[len(shown) :] if text.startswith(shown) else "" for text, shown in both))
        self._shown = AnswerParts(*(shown + more for shown, more in zip(self._shown, new, strict=True)))
        return new

    def _bare(self, thought: str) -> str:
        text = thought.lstrip()
        if self._thoughts:
            text = text.removeprefix(self._thoughts.before.strip()).lstrip().removeprefix(self._thoughts.opens)
        return self._special.sub("", text).lstrip()


def _beginning(thoughts: ThoughtFormat) -> str:
    """What a model writes first where it thinks."""
    return thoughts.before.strip() or thoughts.opens


def _without_end_of(text: str, mark: str) -> str:
    """The text without a last piece of it that may become `mark`."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((text[:-length] for length in lengths if mark.startswith(text[-length:])), text)


class TokenText(NamedTuple):
    """Some text of a prompt, and whether it is a special token. Tokens that make one character together are one."""

    text: str
    special: bool
    tokens: int = 1


_WINDOW = 8
"""How many tokens before one decide its text: a tokenizer may leave out a space that begins a text."""


def token_texts(tokens: Sequence[int], tokenizer: Any) -> list[TokenText]:
    """The text of each token of a prompt."""
    special = {*tokenizer.all_special_ids}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts: list[TokenText] = []
    start, at = 0, 0
    while at < len(tokens):
        start, end = max(0, at - _WINDOW), at + 1
        before = tokenizer.decode(list(tokens[start:at]))
        while end < len(tokens) and tokens[end] not in special and _is_half(tokenizer, tokens[at:end]):
            end += 1
        whole = tokenizer.decode(list(tokens[start:end]))
        text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(tokens[at:end]))
        texts.append(TokenText(text, tokens[at] in special, end - at))
        at = end
    return texts


def _is_half(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether tokens end within a character, of which no more than four bytes can be missing."""
    return len(tokens) < 4 and str(tokenizer.decode(list(tokens))).endswith(_HALF)
