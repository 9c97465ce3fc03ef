"""Rows whose answer has no content."""

import re
from dataclasses import replace

from lorakit.data.cleaning.text_check import RowFinding, normalize_words
from lorakit.data.conversations import Conversation, Text
from lorakit.recipe.problem import quote

# A single "-" or "*" may be the answer to a question about operators or signs; a dot or a question mark is not.
_PUNCTUATION = re.compile(r"[.,;:!?…。、，！？\"'“”‘’_–—\s]+|[-*=~#.\s_]{2,}")
_ANYWHERE = (
    "n/a|n.a|not available|not applicable|todo|to do|tbd|tba|fixme|xxx|placeholder|no answer|no response|no output|nan|"
    "answer here|your answer here|insert answer here|insert text here|insert response here|asdf|#n/a|#ref|#value"
)
_IN_BRACKETS = "answer|output|response|empty|your answer"
_PLACEHOLDERS = frozenset(_ANYWHERE.split("|"))
_BRACKETED_PLACEHOLDERS = frozenset(f"{_ANYWHERE}|{_IN_BRACKETS}".split("|"))
_BRACKETED = re.compile(r"(?:\[\[?|<|\{\{?)\s*([^\[\]<>{}]*?)\s*(?:\]\]?|>|\}\}?)")
_DOUBT = re.compile(
    r"(?:sorry,? )?(?:i (?:really )?(?:don't|do not) know|i have no idea|no idea|idk|dunno)(?: (?:the answer|that))?"
)
_MODEL = r"as an ai(?: language)? (?:model|assistant)"
_SORRY = r"i'?m (?:very |so )?sorry|i am (?:very |so )?sorry|sorry|i apologi[sz]e|unfortunately"
_CANNOT = r"can't|cannot|can not|won't|am unable to|am not able to|'m unable to|'m not able to|don't|do not"
_HELP = r"assist|help|answer|fulfill?|comply|provide|do|process|continue|have (?:the |enough )?(?:ability|information)"
_REFUSAL = re.compile(rf"(?:{_SORRY}|{_MODEL})\b[,.]?\s*(?:but\s+)?(?:{_MODEL},?\s+)?i\s?(?:{_CANNOT})\s+(?:{_HELP})\b")
# What goes on like this is an answer: "Sorry, I can't refund it after a month, but you may change it."
_GOES_ON = re.compile(r"\b(?:however|instead|please|if you|you (?:can|may|could))\b|(?<!sorry)[,.;]\s*but\b")
_SHORT_REFUSAL = 250


def trivial(row: Conversation | Text) -> list[RowFinding]:
    """The finding of an answer that is empty, only punctuation, a placeholder, a bare refusal or the prompt again.

    A short answer is not a trivial one ("42", "yes", "{}"), nor is one that calls a tool.
    """
    if isinstance(row, Text):
        finding = _empty_answer(row.text)
        return [replace(finding, field="text")] if finding else []
    answers = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
    if not answers or row.messages[answers[-1]].get("tool_calls"):
        return []
    last = answers[-1]
    answer = row.messages[last].get("content") or ""
    finding = _empty_answer(answer)
    if not finding and len(answer) <= _SHORT_REFUSAL:
        words = normalize_words(answer).replace("’", "'").strip(" .!")
        if _DOUBT.fullmatch(words) or (_REFUSAL.match(words) and not _GOES_ON.search(words)):
            finding = RowFinding("the answer is a bare refusal", quote(answer.strip()))
    if not finding and last and row.messages[last - 1]["role"] == "user":
        prompt = row.messages[last - 1].get("content") or ""
        if normalize_words(prompt) == normalize_words(answer):
            finding = RowFinding("the answer is the prompt again", quote(answer))
    return [replace(finding, field=f"message {last + 1} (assistant)")] if finding else []


def _empty_answer(text: str) -> RowFinding | None:
    if not text.strip():
        return RowFinding("the answer is empty", "only white space" if text else "")
    if len(text) > 2000:
        return None
    if _PUNCTUATION.fullmatch(text):
        return RowFinding("the answer is only punctuation", quote(text.strip()))
    words = normalize_words(text).strip(" .:!?*_\"'")
    bracketed = _BRACKETED.fullmatch(words)
    word = (bracketed.group(1) if bracketed else words).replace("_", " ").strip(" .:!?")
    if word.startswith("lorem ipsum") or word in (_BRACKETED_PLACEHOLDERS if bracketed else _PLACEHOLDERS):
        return RowFinding("the answer is a placeholder", quote(text.strip()))
    return None
