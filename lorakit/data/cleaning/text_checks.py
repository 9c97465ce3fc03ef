"""Checks of single texts, each of which gives the fixed text and its findings: the encoding, HTML left in prose,
invisible characters, escape sequences, lines of logs."""

import functools
import html as entities
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.recipe.problem import one_line, quote

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
    "log lines with time and level": re.compile(
        rf"^[\[(]?(?:\d{{4}}[-/.]\d\d[-/.]\d\d[T ])?\d\d:\d\d:\d\d[^\s\]]*\]?.{{0,60}}?\b{_LEVEL}"
        rf"|^\W?{_LEVEL}.{{0,12}}\d\d:\d\d:\d\d",
        re.MULTILINE,
    ),
    "lines of a stack trace": re.compile(
        r"^Traceback \(most recent call last\):|^[ \t]+File \"[^\"\n]+\", line \d+"
        r"|^[ \t]+at [\w.$<>/]{1,200}\([\w.$]+(?: Method)?(?::\d+)?\)|^Caused by: [\w.$]+(?:Exception|Error)",
        re.MULTILINE,
    ),
    "progress bars": re.compile(r"\d{1,3}%\s?\|[█▉▊▋▌▍▎▏#=> ]*\||\[[=#]{5,}>?[ .\-]*\]|[█▓░]{10,}"),
}
_CLOCK = re.compile(r"\d\d:\d\d:\d\d")
_HINTS = ("Traceback (", '", line ', "Caused by: ", "%|", "% |", "[==", "[##", "██", "▓", "░", "  at ", "\tat ")
_ABOUT_LOGS = re.compile(
    r"\blog(?:s|ging|ged|file|ger)?\b|traceback|stack ?trace|exception|error|debug|progress ?bar|output of|console"
    r"|terminal", re.IGNORECASE
)  # fmt: skip


@dataclass(frozen=True)
class RowFinding:
    """One thing that a check found in one text of a row."""

    what: str  # the same for all rows alike, so that they can be counted
    case: str = ""
    fixed: bool = True  # the text that the check returns no longer has it
    check: str = ""
    field: str = ""  # the text, as "message 2 (assistant)"


@dataclass(frozen=True)
class TextContext:
    """A text's role ("text" for a document), and the row's texts: all, and `prompts`, not the assistant's."""

    role: str
    prompts: tuple[str, ...]
    texts: tuple[str, ...]


def normalize_words(text: str) -> str:
    """The text in lower case, its words separated by single spaces."""
    return " ".join(text.lower().split())


def _first_few(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (" and others" if len(shown) > 4 else "")


def _split_prose_and_code(text: str) -> list[str]:
    """The text in parts: those at even places are prose, those at odd places code between backticks."""
    return _CODE.split(text) if "`" in text or "~~~" in text else [text]


def encoding(text: str, context: TextContext) -> tuple[str, list[RowFinding]]:
    """Text decoded by the wrong encoding ("cafÃ©"), surrogates and lost characters (U+FFFD, which no fix undoes). What
    is valid stays: no Unicode normalization, no straightened quotes. A surrogate without its other half becomes
    U+FFFD."""
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

    # Lossy, ftfy makes U+FFFD of sequences that lost a byte: better left. Else it may make U+001A of a U+FFFD.
    for lossy in (True, False):
        tried = fix_encoding_and_explain(segment, TextFixerConfig(replace_lossy_sequences=lossy)).text
        if all(tried.count(sign) <= segment.count(sign) for sign in "\ufffd\x1a"):
            segment = tried
            break
    return fix_c1_controls(fix_surrogates(segment) if _SURROGATE.search(segment) else segment)


@functools.cache
def _suspect() -> re.Pattern[str]:
    """Finds what may be decoded wrongly, so that ftfy, which is slow, sees little of what is right: a character for a
    first byte of UTF-8 before one for a later byte, or before a space (a no-break space once); C1 controls, surrogates
    and U+FFFD."""
    first, later = (
        {character for name in _ENCODINGS.split() for character in bytes(codes).decode(name, "ignore")}
        for codes in (range(0xC2, 0xF5), range(0x80, 0xC0))
    )
    pair = f"[{''.join(sorted(first))}][{''.join(sorted(later))}]"
    return re.compile(f"[\x80-\x9f\ud800-\udfff\ufffd]|{pair}|[ÂÃÅÎÐÙ] ")


def noise(text: str, context: TextContext) -> tuple[str, list[RowFinding]]:
    """Control characters, terminal escapes, zero-width characters; lines of logs in answers. Characters are taken out;
    a lone carriage return, a form feed and the like become line breaks. Log lines outside code are found and stay,
    unless a prompt is about logs or errors."""
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
            findings.append(RowFinding("control characters", _first_few(f"U+{ord(one):04X}" for one in characters)))
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
    prose = "\n".join(_split_prose_and_code(text)[::2])
    findings = []
    for what, pattern in _LOG_LINES.items():
        if (hit := pattern.search(prose)) and not any(map(_ABOUT_LOGS.search, context.prompts)):
            line = prose[hit.start() :].strip().split("\n", 1)[0]
            findings.append(RowFinding(f"{what} (no fix takes them out)", quote(line), fixed=False))
    return findings


_PARAGRAPHS = "p br div ul ol li table thead tbody tfoot tr h1 h2 h3 h4 h5 h6 hr center blockquote pre iframe dl dt dd"
_INLINE, _CELL = "span strong em img font sup sub o:p", "td th"
# Prompts make tags of their own with these names ("<summary>", "<title>"), and types of programs have them ("List<a>").
_SECTIONS = (
    "html head body title section article header footer nav main form option figure figcaption address details summary"
)
_LETTERS = "a b i u s q small big tt ins del mark kbd"
_OTHERS = (
    "code samp var abbr cite label input button select textarea link meta style script noscript canvas video audio "
    "source picture svg path time map area object param col colgroup"
)
_CERTAIN = frozenset(f"{_PARAGRAPHS} {_INLINE} {_CELL}".split())
_BLOCKS = frozenset(f"{_PARAGRAPHS} {_SECTIONS}".split())
_PAIRED = frozenset(f"p {_LETTERS}".split())
_ALL = f"{_PARAGRAPHS} {_INLINE} {_CELL} {_SECTIONS} {_LETTERS} {_OTHERS}"
_NAMES = "|".join(sorted(_ALL.split(), key=len, reverse=True))
_MARKUP = re.compile(
    r"<!--(?:(?!<!--).)*?-->|<!doctype [^<>]*>"
    r"|<(?P<raw>script|style)\b(?P<given>[^<>]*)>(?P<inside>(?:(?!</?(?:script|style)\b).)*)</(?P=raw)\s*>"
    rf"|<(?P<close>/?)(?P<name>{_NAMES})(?P<attributes>\s[^<>]*)?/?>",
    re.IGNORECASE | re.DOTALL,
)
_HINT = re.compile(rf"</?(?:{_NAMES})[\s/>]|<!", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"\s[a-z][\w:-]*\s*=\s*[\"'\w#/]", re.IGNORECASE)
_CODE_INSIDE = re.compile(r"[{;(]")
_ENTITY = re.compile(
    r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|amp|lt|gt|quot|apos|nbsp|copy|reg|trade|hellip|[mn]dash|[lr][sd]quo|[sb]dquo|bull"
    r"|middot|[lr]aquo|deg|euro|pound|yen|cent|sect|para|times|divide|plusmn|frac(?:12|14|34)|shy|zwn?j|[et][mh]?n?sp"
    r"|iexcl|iquest|szlig|[A-Za-z](?:acute|grave|circ|uml|tilde|cedil|ring|slash|caron)|(?:ae|AE|oe|OE)lig);"
)
_MANY_BREAKS = re.compile(r"\n(?:[ \t]*\n){2,}")
_BLANKS = "\n\t\xa0\xad\u2002\u2003\u2009\u200c\u200d"
_SURE_ENTITY = re.compile(r"&(?:#\w+|amp|lt|gt|quot|apos|nbsp|[lr][sd]quo|[mn]dash|hellip);")
# What the decoded text must not newly hold: a tag, an element of XML, a token of a chat template.
_OPENS = re.compile(r"<[A-Za-z/!?|]")
_TASK = re.compile(r"(?<![./\w])(?:x?html5?|xml|css|jsx|tsx|svg|xss|jinja2?|markup)\b", re.IGNORECASE)
_REQUEST = re.compile(r"web ?(?:page|site)|landing page|hyperlink|(?:opening|closing|header|meta|anchor) tag", re.I)
_DOCUMENT = re.compile(r"\s*(?:```\w*\s*)?(?:<!doctype html|<html[\s>]|<\?xml )", re.IGNORECASE)


def html(text: str, context: TextContext) -> tuple[str, list[RowFinding]]:
    """Tags and entities of HTML in prose ("<p>", "&nbsp;"). Tags are taken out, those of blocks become line breaks,
    scripts and styles go whole, entities are decoded. Code between backticks stays, as do answers of tools and texts
    that are meant as HTML: whole documents, mostly markup, rows about HTML. Escaped markup ("&lt;b&gt;") is found and
    stays: it may be meant."""
    if context.role == "tool" or not (_HINT.search(text) or ("&" in text and _ENTITY.search(text))):
        return text, []
    parts = _split_prose_and_code(text)
    accepted = _accepted(parts[::2])
    markup = sum(len(hit.group()) for hit in accepted)
    is_page = _DOCUMENT.match(text) or (len(accepted) >= 8 and markup > len(text) / 2)
    if is_page or any(map(_TASK.search, context.texts)) or any(map(_REQUEST.search, context.prompts)):
        return text, []
    findings = []
    if tags := {hit.group() for hit in accepted}:
        findings.append(RowFinding("HTML tags", _first_few(one_line(tag, 30) for tag in tags)))
        parts[::2] = [_without_tags(part, tags) for part in parts[::2]]
    prose = "\n".join(parts[::2])
    shown = {hit.group() for hit in _ENTITY.finditer(prose) if _is_entity(hit)}
    if shown:
        decoded = _decoded(prose, set())
        makes_markup = len(_OPENS.findall(decoded)) > len(_OPENS.findall(prose))
        makes_markup = makes_markup or any(map(_is_entity, _ENTITY.finditer(decoded)))
        escaped = {one for one in shown if makes_markup and entities.unescape(one) in "<>&"}
        if shown - escaped:
            findings.append(RowFinding("HTML entities", _first_few(shown - escaped)))
        if escaped:
            findings.append(RowFinding("escaped markup (it stays: it may be meant)", _first_few(escaped), fixed=False))
        parts[::2] = [_decoded(part, escaped) for part in parts[::2]]
    fixed = "".join(parts)
    return (fixed.strip("\n") if tags else fixed), findings


def _accepted(prose: list[str]) -> list[re.Match[str]]:
    """The tags of HTML among what looks like one: not "List<a>", "<title>" as a prompt's own tag, or "<b@c.d>"."""
    hits = [hit for part in prose for hit in _MARKUP.finditer(part)]
    if any(map(_is_certain, hits)):
        return hits
    names = {(hit["name"].lower(), bool(hit["close"])) for hit in hits if hit["name"]}
    paired = {name for name in _PAIRED if {(name, True), (name, False)} <= names}
    return [hit for hit in hits if _CODE_INSIDE.search(hit["inside"] or "") or (hit["name"] or "").lower() in paired]


def _is_certain(hit: re.Match[str]) -> bool:
    name = hit["name"]
    if not name:
        return not hit["raw"] or bool(_ATTRIBUTE.search(hit["given"]))
    if name.lower() == "p" and not hit["attributes"] and hit.string[max(0, hit.start() - 1) : hit.start()].isalnum():
        return False  # Shared<p>: a type, unless "</p>" is there too
    return name.lower() in _CERTAIN or bool(_ATTRIBUTE.match(hit["attributes"] or ""))


def _without_tags(part: str, tags: set[str]) -> str:
    broke = False

    def replaced(hit: re.Match[str]) -> str:
        nonlocal broke
        if hit.group() not in tags:
            return hit.group()
        name = (hit["name"] or "").lower()
        broke = broke or name in _BLOCKS
        return "\n" if name in _BLOCKS else " " if name in _CELL.split() else ""

    fixed = _MARKUP.sub(replaced, part)
    return _MANY_BREAKS.sub("\n\n", fixed) if broke else fixed


def _is_entity(hit: re.Match[str]) -> bool:
    """False for the address of a variable in C (`p = &copy;`) and for characters that no text has."""
    before = hit.string[max(0, hit.start() - 8) : hit.start()].rstrip(" ")[-1:]
    if before and before in "=(,|&" and not _SURE_ENTITY.fullmatch(hit.group()):
        return False
    character = entities.unescape(hit.group())
    return len(character) == 1 and (character.isprintable() or character in _BLANKS)


def _decoded(prose: str, escaped: set[str]) -> str:
    def replaced(hit: re.Match[str]) -> str:
        if hit.group() in escaped or not _is_entity(hit):
            return hit.group()
        return entities.unescape(hit.group()).replace("\xa0", " ")

    return _ENTITY.sub(replaced, prose)
