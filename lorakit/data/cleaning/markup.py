"""HTML that was left in prose."""

import html as entities
import re

from lorakit.data.cleaning.text_checks import RowFinding, TextContext, first_few, prose_and_code
from lorakit.recipe.problem import one_line

_PARAGRAPHS = "p br div ul ol li table thead tbody tfoot tr h1 h2 h3 h4 h5 h6 hr center blockquote pre iframe dl dt dd"
_INLINE = "span strong em img font sup sub o:p"
_CELL = "td th"
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
_CELLS = frozenset(_CELL.split())
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
_REQUEST = re.compile(
    r"web ?page|web ?site|landing page|hyperlink|(?:opening|closing|header|meta|anchor) tag", re.IGNORECASE
)
_DOCUMENT = re.compile(r"\s*(?:```\w*\s*)?(?:<!doctype html|<html[\s>]|<\?xml )", re.IGNORECASE)


def html(text: str, context: TextContext) -> tuple[str, list[RowFinding]]:
    """Tags and entities of HTML in prose ("<p>", "&nbsp;").

    Tags are taken out, those of blocks become line breaks, scripts and styles go whole, entities are decoded. Code
    between backticks stays, as do texts that are meant as HTML: whole documents, texts that are mostly markup, and rows
    about HTML. Answers of tools are not checked. Escaped markup ("&lt;b&gt;") is found and stays: it may be meant, and
    decoding it would make a tag.
    """
    if context.role == "tool" or not (_HINT.search(text) or ("&" in text and _ENTITY.search(text))):
        return text, []
    parts = prose_and_code(text)
    accepted = _accepted(parts[::2])
    markup = sum(len(hit.group()) for hit in accepted)
    if (
        _DOCUMENT.match(text)
        or (len(accepted) >= 8 and markup > len(text) / 2)
        or any(map(_TASK.search, context.texts))
        or any(map(_REQUEST.search, context.prompts))
    ):
        return text, []
    findings = []
    if tags := {hit.group() for hit in accepted}:
        findings.append(RowFinding("HTML tags", first_few(one_line(tag, 30) for tag in tags)))
        parts[::2] = [_without_tags(part, tags) for part in parts[::2]]
    shown = {hit.group() for part in parts[::2] for hit in _ENTITY.finditer(part) if _is_entity(hit)}
    if shown:
        makes_markup = any(_makes_markup(part) for part in parts[::2])
        escaped = {one for one in shown if makes_markup and entities.unescape(one) in "<>&"}
        if shown - escaped:
            findings.append(RowFinding("HTML entities", first_few(shown - escaped)))
        if escaped:
            findings.append(RowFinding("escaped markup (it stays: it may be meant)", first_few(escaped), fixed=False))
        parts[::2] = [_decoded(part, escaped) for part in parts[::2]]
    fixed = "".join(parts)
    return (fixed.strip("\n") if tags else fixed), findings


def _accepted(prose: list[str]) -> list[re.Match[str]]:
    """The tags of HTML among what looks like one: not "List<a>", "<title>" as a prompt's own tag, or "<b@c.d>"."""
    hits = [hit for part in prose for hit in _MARKUP.finditer(part)]
    if any(map(_is_certain, hits)):
        return hits
    closed = {hit["name"].lower() for hit in hits if hit["close"]}
    opened = {hit["name"].lower() for hit in hits if hit["name"] and not hit["close"]}
    paired = _PAIRED & closed & opened
    return [
        hit
        for hit in hits
        if (hit["name"] or "").lower() in paired or (hit["raw"] and _CODE_INSIDE.search(hit["inside"]))
    ]


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
        return "\n" if name in _BLOCKS else " " if name in _CELLS else ""

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


def _makes_markup(prose: str) -> bool:
    decoded = _decoded(prose, set())
    return len(_OPENS.findall(decoded)) > len(_OPENS.findall(prose)) or any(map(_is_entity, _ENTITY.finditer(decoded)))
