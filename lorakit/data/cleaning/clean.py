"""What is wrong with the texts of one row, and what of it can be fixed without looking at other rows.

The checks of a set as a whole are in `dataset_checks.py` and `minhash.py`; both read the numbers that `row_stats.py`
makes of each row.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import replace

from lorakit.data.chat_template.controls import ControlTexts
from lorakit.data.cleaning.markup import html
from lorakit.data.cleaning.noise import noise
from lorakit.data.cleaning.text_check import RowFinding, TextContext
from lorakit.data.cleaning.trivial_answers import trivial
from lorakit.data.conversations import Conversation, Message, RowContent, Text, Tokens

_ROUNDS = 4
# The encodings of one byte a character that ftfy undoes (ftfy.chardata.CHARMAP_ENCODINGS).
_ENCODINGS = "latin-1 cp1252 cp1251 cp1250 cp1253 cp1254 cp1257 iso8859-2 mac-roman cp437"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEGMENT = re.compile(r"[^\n]{1,1000000}")


def encoding(text: str, context: TextContext) -> tuple[str, list[RowFinding]]:
    """Text decoded by the wrong encoding ("cafÃ©"), surrogates and lost characters (U+FFFD).

    What is valid stays as it is: no Unicode normalization, no straightened quotes. U+FFFD is found and cannot be
    undone; a surrogate without its other half becomes U+FFFD, without which no file can be written.
    """
    if text.isascii() or not _suspect().search(text):
        return text, []
    fixed = _SEGMENT.sub(lambda segment: _fix_encoding(segment.group()), text)
    findings = []
    if fixed != text:
        start = next((at for at, (a, b) in enumerate(zip(text, fixed, strict=False)) if a != b), len(fixed))
        case = f"{text[max(0, start - 10) : start + 10]!r} for {fixed[max(0, start - 10) : start + 8]!r}"
        findings.append(RowFinding("text decoded by the wrong encoding", case))
    if lost := fixed.count("\ufffd"):
        what = "characters lost to a wrong encoding (U+FFFD, no fix brings them back)"
        findings.append(RowFinding(what, f"{lost} of them", fixed=False))
    return fixed, findings


def _fix_encoding(segment: str) -> str:
    if segment.isascii() or not _suspect().search(segment):
        return segment
    from ftfy import TextFixerConfig, fix_encoding_and_explain  # the recipe's schema must not wait for it
    from ftfy.fixes import fix_c1_controls, fix_surrogates

    fixed = segment
    for lossy in (True, False):
        # Lossy, ftfy makes U+FFFD of sequences that lost a byte: better left. Else it may make U+001A of a U+FFFD.
        tried = fix_encoding_and_explain(segment, TextFixerConfig(replace_lossy_sequences=lossy)).text
        if tried.count("\ufffd") <= segment.count("\ufffd") and tried.count("\x1a") <= segment.count("\x1a"):
            fixed = tried
            break
    return fix_c1_controls(fix_surrogates(fixed) if _SURROGATE.search(fixed) else fixed)


@functools.cache
def _suspect() -> re.Pattern[str]:
    """Finds what may be decoded wrongly, so that ftfy, which is slow, sees little of what is right.

    That is: a character that stands for a first byte of UTF-8 before one that stands for a later byte, or before a
    space that was a no-break space; C1 control characters, surrogates and U+FFFD.
    """
    first, later = (
        {character for name in _ENCODINGS.split() for character in bytes(codes).decode(name, "ignore")}
        for codes in (range(0xC2, 0xF5), range(0x80, 0xC0))
    )
    pair = f"[{''.join(sorted(first))}][{''.join(sorted(later))}]"
    return re.compile(f"[\x80-\x9f\ud800-\udfff\ufffd]|{pair}|[ÂÃÅÎÐÙ] ")


CHECKS = {"encoding": encoding, "html": html, "noise": noise}
"""The checks of a single text, in the order in which they run: each gives the fixed text and its findings."""


def clean(
    row: RowContent, actions: Mapping[str, str], controls: ControlTexts | None = None
) -> tuple[RowContent | None, list[RowFinding]]:
    """The fixed row, or None where it is to be left out, and all that was found in it.

    `actions` has one of off, report, fix and error for `encoding`, `html`, `noise`, `trivial` and, where the model's
    `controls` are given, `special_tokens`; other keys are not read, a missing one is off. Only `fix` changes the row;
    what `error` finds, the caller raises. Token ids are never touched, nor tools and tool calls. A row cleaned once has
    nothing left to fix.
    """
    if isinstance(row, Tokens):
        return row, []
    checks = {name: actions[name] for name in CHECKS if actions.get(name, "off") != "off"}
    cleaned, findings = _fix(row, checks) if checks else (row, [])
    for check in ("trivial", "special_tokens"):
        action = actions.get(check, "off")
        if action == "off":
            continue
        if check == "trivial":
            hits = trivial(cleaned)
        else:
            hits = [RowFinding(what, field=field) for what, field in controls.spelled(cleaned)] if controls else []
        findings += [replace(hit, check=check, fixed=action == "fix") for hit in hits]
        if hits and action == "fix":
            return None, findings
    return cleaned, findings


def _fix(row: Conversation | Text, actions: Mapping[str, str]) -> tuple[Conversation | Text, list[RowFinding]]:
    """Repeats the checks until nothing changes: decoding an entity may reveal a control character."""
    findings: dict[tuple[str, str, str], RowFinding] = {}
    before = row
    for _ in range(_ROUNDS):
        after = _fix_once(before, actions, findings)
        if after is before:
            return after, list(findings.values())
        before = after
    # Only nested nonsense such as "<<b>b>" goes on: what does not settle is left as it came.
    return row, [replace(finding, fixed=False) for finding in findings.values()]


def _fix_once(
    row: Conversation | Text, actions: Mapping[str, str], findings: dict[tuple[str, str, str], RowFinding]
) -> Conversation | Text:
    """Each check once on each text; adds to `findings`, and gives `row` itself where nothing changed."""

    def fix(text: str, field: str, context: TextContext) -> str:
        for name, action in actions.items():
            fixed, new = CHECKS[name](text, context)
            for one in new:
                finding = replace(one, check=name, field=field, fixed=one.fixed and action == "fix")
                findings.setdefault((name, one.what, field), finding)
            if action == "fix":
                text = fixed
        return text

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
