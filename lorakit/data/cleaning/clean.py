"""What is wrong with the texts of one row, and what of it can be put right without looking at other rows.

The checks of a set as a whole are in `across.py`, those of near-duplicates in `near.py`; both read the numbers that
`traits.py` makes of each row.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from lorakit.data.chat_template.controls import ControlTexts
from lorakit.data.cleaning.markup import html
from lorakit.data.cleaning.noise import noise
from lorakit.data.cleaning.text_check import TextContext, TextFinding
from lorakit.data.cleaning.trivial_answers import trivial
from lorakit.data.conversations import Conversation, Message, RowContent, Text, Tokens

_ROUNDS = 4
# The encodings of one byte a character that ftfy undoes (ftfy.chardata.CHARMAP_ENCODINGS).
_ENCODINGS = "latin-1 cp1252 cp1251 cp1250 cp1253 cp1254 cp1257 iso8859-2 mac-roman cp437"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEGMENT = 1_000_000


@dataclass(frozen=True)
class RowFinding:
    """One thing that a check found in one text of a row.

    `what` is the same for all rows alike, so that they can be counted; `case` is what this row has. `field` names the
    text, such as "message 2 (assistant)". `fixed` says that the row returned no longer has it.
    """

    check: str
    what: str
    fixed: bool
    field: str
    case: str = ""


def encoding(text: str, place: TextContext) -> tuple[str, list[TextFinding]]:
    """Text decoded by the wrong encoding ("cafÃ©"), surrogates and lost characters (U+FFFD).

    What is valid stays as it is: no Unicode normalization, no straightened quotes. U+FFFD is found and cannot be
    undone; a surrogate without its other half becomes U+FFFD, without which no file can be written.
    """
    if text.isascii() or not _suspect().search(text):
        return text, []
    fixed = "".join(_repaired(segment) for line in text.split("\n") for segment in ("\n", *_segments(line)))[1:]
    found = []
    if fixed != text:
        start = next((i for i, (a, b) in enumerate(zip(text, fixed, strict=False)) if a != b), len(fixed))
        case = f"{text[max(0, start - 10) : start + 10]!r} for {fixed[max(0, start - 10) : start + 8]!r}"
        found.append(TextFinding("text decoded by the wrong encoding", case))
    if lost := fixed.count("\ufffd"):
        found.append(
            TextFinding(
                "characters lost to a wrong encoding (U+FFFD, no fix brings them back)",
                f"{lost} of them",
                fixable=False,
            )
        )
    return fixed, found


def _segments(line: str) -> Iterator[str]:
    for start in range(0, len(line), _SEGMENT):
        yield line[start : start + _SEGMENT]


def _repaired(segment: str) -> str:
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
    encodings = _ENCODINGS.split()
    first = {one for name in encodings for one in bytes(range(0xC2, 0xF5)).decode(name, "ignore")}
    later = {one for name in encodings for one in bytes(range(0x80, 0xC0)).decode(name, "ignore")}
    pair = f"[{''.join(sorted(first))}][{''.join(sorted(later))}]"
    return re.compile(f"[\x80-\x9f\ud800-\udfff\ufffd]|{pair}|[ÂÃÅÎÐÙ] ")


Check = Callable[[str, TextContext], tuple[str, list[TextFinding]]]

CHECKS: dict[str, Check] = {"encoding": encoding, "html": html, "noise": noise}
"""The checks of a single text, in the order in which they run: each gives the text put right and what it found."""


def clean(
    said: RowContent, wanted: Mapping[str, str], controls: ControlTexts | None = None
) -> tuple[RowContent | None, list[RowFinding]]:
    """The row put right, or None where it is to be left out, and all that was found in it.

    `wanted` has an action (off, report, fix, error) for `encoding`, `html`, `noise`, `trivial` and, where the model's
    `controls` are given, `special_tokens`; other keys are not read, a missing one is off. Only `fix` changes the row;
    what `error` finds, the caller raises. Token ids are never touched, nor tools and tool calls. A row cleaned once has
    nothing left to fix.
    """
    if isinstance(said, Tokens):
        return said, []
    checks = {name: wanted[name] for name in CHECKS if wanted.get(name, "off") != "off"}
    cleaned, findings = _put_right(said, checks) if checks else (said, [])
    action = wanted.get("trivial", "off")
    if action != "off" and (hit := trivial(cleaned)):
        where, found = hit
        findings.append(RowFinding("trivial", found.what, action == "fix", where, found.case))
        if action == "fix":
            return None, findings
    action = wanted.get("special_tokens", "off")
    if controls is not None and action != "off":
        hits = [RowFinding("special_tokens", what, action == "fix", *at) for what, *at in controls.spelled(cleaned)]
        if hits and action == "fix":
            return None, [*findings, *hits]
        findings += hits
    return cleaned, findings


def _put_right(said: Conversation | Text, wanted: Mapping[str, str]) -> tuple[Conversation | Text, list[RowFinding]]:
    """Repeats the checks until nothing changes: decoding an entity may show a control character."""
    findings: dict[tuple[str, str, str], RowFinding] = {}
    before = said
    for _ in range(_ROUNDS):
        after, found = _round(before, wanted)
        for finding in found:
            findings.setdefault((finding.check, finding.what, finding.field), finding)
        if after is before:
            return after, list(findings.values())
        before = after
    # Only nested nonsense such as "<<b>b>" goes on: what does not settle is left as it came.
    return said, [replace(finding, fixed=False) for finding in findings.values()]


def _round(said: Conversation | Text, wanted: Mapping[str, str]) -> tuple[Conversation | Text, list[RowFinding]]:
    """Each check once on each text; gives `said` itself where nothing changed."""
    if isinstance(said, Text):
        text, findings = _checked(said.text, TextContext("text", "text", (), (said.text,)), wanted)
        return (said if text == said.text else Text(text)), findings
    texts = tuple(message.get("content") or "" for message in said.messages)
    prompts = tuple(text for text, message in zip(texts, said.messages, strict=True) if message["role"] != "assistant")
    findings = []
    messages: list[Message] = []
    for number, message in enumerate(said.messages, start=1):
        changed = {}
        for key in ("thinking", "content"):
            if not message.get(key):
                continue
            field = f"message {number} ({message['role']})" + (", thinking" if key == "thinking" else "")
            text, found = _checked(message[key], TextContext(message["role"], field, prompts, texts), wanted)
            findings += found
            if text != message[key]:
                changed[key] = text
        messages.append({**message, **changed} if changed else message)
    same = all(new is old for new, old in zip(messages, said.messages, strict=True))
    return (said if same else replace(said, messages=messages)), findings


def _checked(text: str, place: TextContext, wanted: Mapping[str, str]) -> tuple[str, list[RowFinding]]:
    findings = []
    for name, action in wanted.items():
        fixed, found = CHECKS[name](text, place)
        findings += [
            RowFinding(name, one.what, one.fixable and action == "fix", place.field, one.case) for one in found
        ]
        if action == "fix":
            text = fixed
    return text, findings
