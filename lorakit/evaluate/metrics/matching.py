"""Metrics that compare texts: the same, the same but for the writing, one inside the other, a part of each."""

import re
import string
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from lorakit.recipe.fields import Wording
from lorakit.recipe.problem import quote
from lorakit.registry import METRICS, Section

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts that put no space between words: a word's edge cannot be seen, and characters are counted one by one.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_EDGED = re.compile(f"(?![{_UNSPACED}])[^\\W_]")
_TOKEN = re.compile(f"[{_UNSPACED}]|(?:{_EDGED.pattern})+")

_MARK = "####"
# A longer run of digits is no number that anybody computed, and reading it would take quadratic time.
_LONGEST = 300
_NUMBER = re.compile(
    r"""(?<![A-Za-z0-9_])(?<![A-Za-z0-9]\.)                      # not inside a word, nor after the point of a number
        (?: (?<!/)(?P<over>[0-9]+)/(?P<under>0*[1-9][0-9]*)(?![0-9/])              # 3/4, but not a date's 3/4/2020
          | (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?P<part>\.[0-9]+)?
            (?:(?<=[0-9])[eE](?P<power>[-+]?[0-9]{1,2})(?![0-9A-Za-z]))?
        )""",
    re.VERBOSE,
)
# A minus, with or without a currency after it; after a word, a number or a bracket it is a dash or a difference.
_NEGATIVE = re.compile(r"(?<![\w)\]])-[$€£¥]?\Z")
_MINUSES = str.maketrans("−–﹣－", "----")


def tokens(text: str) -> list[str]:
    """Lower-case runs of letters and digits; of scripts without spaces, each character. On ASCII text these are the
    tokens of rouge-score's own tokenizer, which drops every other letter."""
    return _TOKEN.findall(text.lower())


@METRICS.register("exact-match")
def exact_match(answer: str, reference: str) -> dict[str, float]:
    """The answer is the reference; white space around them does not matter."""
    return {"": float(answer.strip() == reference.strip())}


def _normalized(text: str) -> str:
    """SQuAD's normal form (evaluate-v1.1.py): lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


@METRICS.register("normalized-match")
def normalized_match(answer: str, reference: str) -> dict[str, float]:
    """The answer is the reference without letter case, punctuation, English articles and white space (as in SQuAD)."""
    return {"": float(_normalized(answer) == _normalized(reference))}


@METRICS.register("token-f1")
def token_f1(answer: str, reference: str) -> dict[str, float]:
    """The words that answer and reference share: F1 of precision and recall, on SQuAD's normal form.

    Two texts without words share all of them; if only one has none, the score is 0 (as in SQuAD 2.0's script).
    """
    given, wanted = Counter(_normalized(answer).split()), Counter(_normalized(reference).split())
    if not given or not wanted:
        return {"": float(given == wanted)}
    shared = (given & wanted).total()
    return {"": 2 * shared / (given.total() + wanted.total())}


@METRICS.register("contains")
def contains(answer: str, reference: str) -> dict[str, float]:
    """The answer contains the reference as whole words; letter case and white space do not matter.

    A reference without text has no score. No word or number is cut in two: `cat` is not in `concatenate`, nor `5` in
    `15`.
    """
    wanted, text = (" ".join(unicodedata.normalize("NFKC", one).casefold().split()) for one in (reference, answer))
    if not wanted:
        return {}
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not _joined(text[start - 1 : start], wanted[0]) and not _joined(wanted[-1], text[end : end + 1]):
            return {"": 1.0}
        start = text.find(wanted, start + 1)
    return {"": 0.0}


def _joined(left: str, right: str) -> bool:
    return bool(_EDGED.match(left) and _EDGED.match(right))


class Regex(Section):
    """Settings of regex."""

    pattern: Annotated[str, Field(min_length=1), Wording("a regular expression", "'Answer: (\\w+)'")]
    """A regular expression to search for in answer and reference. The first of its groups that takes part in the \
match is compared, or the whole match if it has no groups; a reference that it does not match is compared as a whole."""
    take: Literal["first", "last"] = "first"
    """Which match counts if there are several."""


def _regex_mistakes(settings: Regex) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    try:
        re.compile(settings.pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = f"{quote(settings.pattern)} is not a regular expression: {error}"
        yield ("pattern",), reason, "Correct it, or put a backslash before a character that is meant as it is."


@METRICS.register("regex", settings=Regex, mistakes=_regex_mistakes)
def regex(answer: str, reference: str, settings: Regex) -> dict[str, float]:
    """What a pattern finds in the answer is what it finds in the reference, or the reference itself.

    White space around it does not count. An answer in which the pattern finds nothing is wrong.
    """
    given, wanted = _search(settings, answer), _search(settings, reference)
    return {"": float(given is not None and given == (reference.strip() if wanted is None else wanted))}


def _search(settings: Regex, text: str) -> str | None:
    """The first group that took part in the match, or all of it; None if nothing matches."""
    matches = re.finditer(settings.pattern, text)
    match = next(iter(deque(matches, maxlen=1) if settings.take == "last" else matches), None)
    if match is None:
        return None
    return next((group for group in match.groups() if group is not None), match.group()).strip()


@METRICS.register("number-match")
def number_match(answer: str, reference: str) -> dict[str, float]:
    """The final number is the same: after `####`, or the last; `1,200`, `$1200.00` and `1200` are one number.

    `1/2` is 0.5, and `50%` is 50, not 0.5: units are ignored. Values are compared exactly, so 0.33 is not
    1/3. A row whose reference has no number has no score.
    """
    wanted = final_number(reference)
    return {} if wanted is None else {"": float(final_number(answer) == wanted)}


def final_number(text: str) -> Fraction | None:
    """The number after the last `####` if there is that mark (GSM8K's), else the last number of the text. Exactly:
    signs, `1,234.5`, `$5`, `.5`, `3/4`, `1e-4`; a percent sign does not count."""
    _, mark, rest = text.translate(_MINUSES).rpartition(_MARK)
    number = None
    for match in _NUMBER.finditer(rest):
        if not match[0] or len(match[0]) > _LONGEST:
            continue
        if match["over"]:
            number = Fraction(int(match["over"]), int(match["under"]))
        else:
            number = Fraction((match["whole"] or "0").replace(",", "") + (match["part"] or ""))
            number *= Fraction(10) ** int(match["power"] or 0)
        if _NEGATIVE.search(rest[max(0, match.start() - 3) : match.start()]):
            number = -number
        if mark:
            break
    return number
