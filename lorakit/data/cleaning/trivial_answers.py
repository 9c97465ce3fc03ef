"""Rows whose answer says nothing."""

import re

from lorakit.data.cleaning.text_check import TextFinding
from lorakit.data.conversations import Conversation, Text

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


def trivial(said: Conversation | Text) -> tuple[str, TextFinding] | None:
    """Answers that are empty, only punctuation, a placeholder, a bare refusal, or the prompt again.

    Gives the field and what was found there, or None. A short answer is not a trivial one ("42", "yes", "{}"); an
    answer that calls a tool is none. Put right by leaving the row out.
    """
    if isinstance(said, Text):
        found = _says_nothing(said.text)
        return ("text", found) if found else None
    answers = [i for i, message in enumerate(said.messages) if message["role"] == "assistant"]
    if not answers or said.messages[answers[-1]].get("tool_calls"):
        return None
    last = answers[-1]
    answer = said.messages[last].get("content") or ""
    found = _says_nothing(answer) or _refuses(answer)
    if not found and last and said.messages[last - 1]["role"] == "user":
        prompt = said.messages[last - 1].get("content") or ""
        if _plain(prompt) == _plain(answer):
            found = TextFinding("the answer is the prompt again", _shown(answer))
    return (f"message {last + 1} (assistant)", found) if found else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _says_nothing(text: str) -> TextFinding | None:
    if not text.strip():
        return TextFinding("the answer is empty", "only white space" if text else "")
    if len(text) > 2000:
        return None
    if _PUNCTUATION.fullmatch(text):
        return TextFinding("the answer is only punctuation", _shown(text.strip()))
    plain = _plain(text).strip(" .:!?*_\"'")
    bracketed = _BRACKETED.fullmatch(plain)
    word = (bracketed.group(1) if bracketed else plain).replace("_", " ").strip(" .:!?")
    if word.startswith("lorem ipsum") or word in (_BRACKETED_PLACEHOLDERS if bracketed else _PLACEHOLDERS):
        return TextFinding("the answer is a placeholder", _shown(text.strip()))
    return None


def _refuses(text: str) -> TextFinding | None:
    if len(text) > _SHORT_REFUSAL:
        return None
    plain = _plain(text).replace("’", "'").strip(" .!")
    if _DOUBT.fullmatch(plain) or (_REFUSAL.match(plain) and not _GOES_ON.search(plain)):
        return TextFinding("the answer is a bare refusal", _shown(text.strip()))
    return None
