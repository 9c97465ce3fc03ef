"""What is wrong with the texts of one row, and what of it can be fixed without looking at other rows. The checks of a
whole set are in `dataset_checks.py` and `minhash.py`; both read the numbers that `row_stats.py` makes of each row."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from lorakit.data.chat_template.controls import ControlTexts
from lorakit.data.cleaning.text_checks import RowFinding, TextContext, encoding, html, noise, normalize_words
from lorakit.data.rows import Conversation, Message, RowContent, Text, Tokens
from lorakit.recipe.problem import quote

_ROUNDS = 4

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

CHECKS = {"encoding": encoding, "html": html, "noise": noise}
"""The checks of a single text, in the order in which they run: each gives the fixed text and its findings."""


def clean(
    row: RowContent, actions: Mapping[str, str], controls: ControlTexts | None = None
) -> tuple[RowContent | None, list[RowFinding]]:
    """The fixed row, or None where it is to be left out, and all that was found in it. `actions` has one of off,
    report, fix and error for `encoding`, `html`, `noise`, `trivial` and, where the model's `controls` are given,
    `special_tokens`; a missing one is off. Only `fix` changes the row; what `error` finds, the caller raises. Token
    ids, tools and tool calls are never touched. A row cleaned once has nothing left to fix."""
    if isinstance(row, Tokens):
        return row, []
    checks = {name: actions[name] for name in CHECKS if actions.get(name, "off") != "off"}
    cleaned, findings = _fix(row, checks) if checks else (row, [])
    for check in ("trivial", "special_tokens"):
        action = actions.get(check, "off")
        if action == "off":
            continue
        if check == "trivial":
            hits = _trivial(cleaned)
        else:
            hits = [RowFinding(what, field=field) for what, field in controls.spelled(cleaned)] if controls else []
        findings += [replace(hit, check=check, fixed=action == "fix") for hit in hits]
        if hits and action == "fix":
            return None, findings
    return cleaned, findings


def _fix(row: Conversation | Text, actions: Mapping[str, str]) -> tuple[Conversation | Text, list[RowFinding]]:
    """Repeats the checks until nothing changes: decoding an entity may reveal a control character."""
    findings: dict[tuple[str, str, str], RowFinding] = {}

    def fix(text: str, field: str, context: TextContext) -> str:
        for name, action in actions.items():
            fixed, new = CHECKS[name](text, context)
            for one in new:
                finding = replace(one, check=name, field=field, fixed=one.fixed and action == "fix")
                findings.setdefault((name, one.what, field), finding)
            if action == "fix":
                text = fixed
        return text

    before = row
    for _ in range(_ROUNDS):
        after = _map_texts(before, fix)
        if after is before:
            return after, list(findings.values())
        before = after
    # Only nested nonsense such as "<<b>b>" goes on: what does not settle is left as it came.
    return row, [replace(finding, fixed=False) for finding in findings.values()]


def _map_texts(row: Conversation | Text, fix: Callable[[str, str, TextContext], str]) -> Conversation | Text:
    """The row with each text fixed; `row` itself where nothing changed."""
    if isinstance(row, Text):
        text = fix(row.text, "text", TextContext("text", (), (row.text,)))
        return row if text == row.text else Text(text)
    texts = tuple(message.get("content") or "" for message in row.messages)
    prompts = tuple(text for text, message in zip(texts, row.messages, strict=True) if message["role"] != "assistant")
    messages: list[Message] = []
    for number, message in enumerate(row.messages, start=1):
        context, field = TextContext(message["role"], prompts, texts), f"message {number} ({message['role']})"
        for key, name in (("thinking", f"{field}, thinking"), ("content", field)):
            if message.get(key) and (text := fix(message[key], name, context)) != message[key]:
                message = {**message, key: text}
        messages.append(message)
    return row if messages == row.messages else replace(row, messages=messages)


def _trivial(row: Conversation | Text) -> list[RowFinding]:
    """The finding of an answer that is empty, only punctuation, a placeholder, a bare refusal or the prompt again. A
    short answer is not a trivial one ("42", "yes", "{}"), nor is one that calls a tool."""
    if isinstance(row, Text):
        finding = _empty_answer(row.text)
        return [replace(finding, field="text")] if finding else []
    last = max((at for at, message in enumerate(row.messages) if message["role"] == "assistant"), default=None)
    if last is None or row.messages[last].get("tool_calls"):
        return []
    answer = row.messages[last].get("content") or ""
    prompt = row.messages[last - 1] if last else {"role": ""}
    finding = _empty_answer(answer)
    if not finding and len(answer) <= _SHORT_REFUSAL:
        words = normalize_words(answer).replace("’", "'").strip(" .!")
        if _DOUBT.fullmatch(words) or (_REFUSAL.match(words) and not _GOES_ON.search(words)):
            finding = RowFinding("the answer is a bare refusal", quote(answer.strip()))
    again = prompt["role"] == "user" and normalize_words(prompt.get("content") or "") == normalize_words(answer)
    if not finding and again:
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
