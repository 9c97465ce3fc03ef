"""Invisible characters, escape sequences of terminals, and lines of logs."""

import re

from lorakit.data.cleaning.text_check import RowFinding, TextContext, first_few, prose_and_code
from lorakit.recipe.problem import quote

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
