"""Checks of single texts, with what they share: the encoding, invisible characters, escape sequences, lines of logs."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.recipe.problem import quote

# A fence that is not closed runs to the end; code between single or double backticks stays on its line.
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|``?[^`\n]+``?)", re.DOTALL)

# The encodings of one byte a character that ftfy undoes (ftfy.chardata.CHARMAP_ENCODINGS).
_ENCODINGS = "latin-1 cp1252 cp1251 cp1250 cp1253 cp1254 cp1257 iso8859-2 mac-roman cp437"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEGMENT = re.compile(r"[^\n]{1,1000000}")

# ECMA-48: CSI sequences, OSC strings (closed by BEL or ST), and the two-character escapes.
_ANSI = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"
    "|\x1b\\][^\x07\x1b\x9c\n]*(?:\x07|\x1b\\\\|\x9c)|\x1b[ -/]+[0-~]|\x1b[0-Z\\\\^_`-~]"
)
_BREAKS = re.compile("\r(?!\n)|[\x0b\x0c\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_ANY_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
# Joiners (U+200C, U+200D) shape Arabic and Indic letters and emoji, U+200B parts the words of Thai, Khmer, Lao and
# Burmese, and tag characters make flags: there they stay. Between Latin letters, spaces and signs they show nothing.
_ZERO_WIDTH = re.compile(
    "[\ufeff\u2060\u180e]"
    "|(?<![^\x00-\u024f\u200b-\u200f])[\u200c\u200d]+(?![^\x00-\u024f\u200b-\u200f])"
    "|(?<![\u0e00-\u109f\u1780-\u17ff])\u200b+(?![\u0e00-\u109f\u1780-\u17ff])"
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"
)
_MARKS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")

_LEVEL = r"(?:TRACE|DEBUG|INFO|NOTICE|WARN|WARNING|ERROR|ERR|FATAL|CRITICAL|SEVERE)\b"
_LOG_LINES = {
    "log lines with time and level (no fix takes them out)": re.compile(
        rf"^[\[(]?(?:\d{{4}}[-/.]\d\d[-/.]\d\d[T ])?\d\d:\d\d:\d\d[^\s\]]*\]?.{{0,60}}?\b{_LEVEL}"
        rf"|^\W?{_LEVEL}.{{0,12}}\d\d:\d\d:\d\d",
        re.MULTILINE,
    ),
    "lines of a stack trace (no fix takes them out)": re.compile(
        r"^Traceback \(most recent call last\):|^[ \t]+File \"[^\"\n]+\", line \d+"
        r"|^[ \t]+at [\w.$<>/]{1,200}\([\w.$]+(?: Method)?(?::\d+)?\)|^Caused by: [\w.$]+(?:Exception|Error)",
        re.MULTILINE,
    ),
    "progress bars (no fix takes them out)": re.compile(
        r"\d{1,3}%\s?\|[█▉▊▋▌▍▎▏#=> ]*\||\[[=#]{5,}>?[ .\-]*\]|[█▓░]{10,}"
    ),
}
_CLOCK = re.compile(r"\d\d:\d\d:\d\d")
_HINTS = ("Traceback (", '", line ', "Caused by: ", "%|", "% |", "[==", "[##", "██", "▓", "░", "  at ", "\tat ")
_ABOUT_LOGS = re.compile(
    r"\blog(?:s|ging|ged|file|ger)?\b|traceback|stack ?trace|exception|error|debug|progress ?bar"
    r"|output of|console|terminal",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RowFinding:
    """One thing that a check found in one text of a row.

    `what` is the same for all rows alike, so that they can be counted; `case` is this row's. `fixed`: the text that the
    check returns no longer has it. `clean` fills in the check and `field`, the text, as "message 2 (assistant)".
    """

    what: str
    case: str = ""
    fixed: bool = True
    check: str = ""
    field: str = ""


@dataclass(frozen=True)
class TextContext:
    """A text's role ("text" for a document), and the row's texts: all, and `prompts`, not the assistant's."""

    role: str
    prompts: tuple[str, ...]
    texts: tuple[str, ...]


def normalize_words(text: str) -> str:
    """The text in lower case, its words separated by single spaces."""
    return " ".join(text.lower().split())


def first_few(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (" and others" if len(shown) > 4 else "")


def prose_and_code(text: str) -> list[str]:
    """The text in parts: those at even places are prose, those at odd places code between backticks."""
    return _CODE.split(text) if "`" in text or "~~~" in text else [text]


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


def noise(text: str, context: TextContext) -> tuple[str, list[RowFinding]]:
    """Control characters, terminal escapes, zero-width characters; lines of logs in answers.

    Characters are taken out; a lone carriage return, a form feed and the like become line breaks, and a carriage
    return before a line break stays. Log lines outside code are found and stay, since they may belong there. Where a
    prompt is about logs or errors they are expected.
    """
    log_lines = _log_lines(text, context)
    if text.replace("\n", "").replace("\t", "").isprintable():  # a fast "no"
        return text, log_lines
    fixed, findings = text, []
    if _ANY_CONTROL.search(text):
        fixed, count = _ANSI.subn("", fixed)
        if count:
            findings.append(RowFinding("terminal escape sequences", f"{count} of them"))
        fixed, breaks = _BREAKS.subn("\n", fixed)
        fixed, count = _CONTROL.subn("", fixed)
        if breaks or count:
            characters = set(_ANY_CONTROL.findall(_ANSI.sub("", text).replace("\r\n", "")))
            findings.append(RowFinding("control characters", first_few(f"U+{ord(one):04X}" for one in characters)))
    if not fixed.isascii():
        visible = _ZERO_WIDTH.sub("", fixed)
        if _MARKS.search(visible) and not _RIGHT_TO_LEFT.search(visible):
            visible = _MARKS.sub("", visible)
        if visible != fixed:
            findings.append(RowFinding("zero-width characters", f"{len(fixed) - len(visible)} of them"))
        fixed = visible
    return fixed, findings + log_lines


def _log_lines(text: str, context: TextContext) -> list[RowFinding]:
    may_be_log = any(hint in text for hint in _HINTS) or (text.count(":") > 1 and bool(_CLOCK.search(text)))
    if not may_be_log or context.role not in ("assistant", "text"):
        return []
    prose = "\n".join(prose_and_code(text)[::2])
    findings = []
    for what, pattern in _LOG_LINES.items():
        if (hit := pattern.search(prose)) and not any(map(_ABOUT_LOGS.search, context.prompts)):
            line = prose[hit.start() :].lstrip("\n").split("\n", 1)[0].strip()
            findings.append(RowFinding(what, quote(line), fixed=False))
    return findings
