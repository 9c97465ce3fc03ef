"""Metrics that compare texts: the same, the same but for the writing, one inside the other, one part of each."""

import re
import string
from collections import Counter, deque

from lorakit.evaluate.metrics.settings import Regex, regex_mistakes
from lorakit.evaluate.metrics.words import folded, stands_in
from lorakit.registry import METRICS

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@METRICS.register("exact-match")
def exact_match(answer: str, reference: str) -> dict[str, float]:
    """The answer is the reference, surrounding white space aside."""
    return {"": float(answer.strip() == reference.strip())}


def normalized(text: str) -> str:
    """SQuAD's normal form (evaluate-v1.1.py): lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


@METRICS.register("normalized-match")
def normalized_match(answer: str, reference: str) -> dict[str, float]:
    """The answer is the reference, letter case, punctuation, English articles and white space aside (as in SQuAD)."""
    return {"": float(normalized(answer) == normalized(reference))}


@METRICS.register("token-f1")
def token_f1(answer: str, reference: str) -> dict[str, float]:
    """The words that answer and reference share: F1 of precision and recall, on SQuAD's normal form.

    Two texts without words share all of them; where one has none, the score is 0 (as in SQuAD 2.0's script).
    """
    given, wanted = Counter(normalized(answer).split()), Counter(normalized(reference).split())
    if not given or not wanted:
        return {"": float(given == wanted)}
    shared = (given & wanted).total()
    return {"": 2 * shared / (given.total() + wanted.total())}


@METRICS.register("contains")
def contains(answer: str, reference: str) -> dict[str, float]:
    """The reference stands in the answer as whole words, letter case and white space aside.

    A reference without text is in no row's answer: such a row has no score.
    """
    wanted = folded(reference)
    return {"": float(stands_in(wanted, folded(answer)))} if wanted else {}


@METRICS.register("regex", settings=Regex, mistakes=regex_mistakes)
def regex(answer: str, reference: str, settings: Regex) -> dict[str, float]:
    """What a pattern finds in the answer is what it finds in the reference, or the reference itself.

    White space around it does not count. An answer in which the pattern finds nothing is wrong.
    """
    given = _found(settings, answer)
    wanted = _found(settings, reference)
    return {"": float(given is not None and given == (reference.strip() if wanted is None else wanted))}


def _found(settings: Regex, text: str) -> str | None:
    """The first group that took part in the match, or all of it; None where nothing matches."""
    matches = re.finditer(settings.pattern, text)
    match = next(matches, None)
    if settings.take == "last":
        match = next(iter(deque(matches, maxlen=1)), match)
    if match is None:
        return None
    return next((group for group in match.groups() if group is not None), match.group()).strip()
