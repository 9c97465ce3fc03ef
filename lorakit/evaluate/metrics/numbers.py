"""`number-match`: the number in which an answer ends, compared by its value."""

import re
from fractions import Fraction

from lorakit.registry import METRICS

_MARK = "####"
# A digit run beyond this is no number that anybody computed; reading it would take quadratic time.
_LONGEST = 300
_NUMBER = re.compile(
    r"""(?<![A-Za-z0-9_])(?<![A-Za-z0-9]\.)                      # not inside a word, nor behind the point of a number
        (?: (?<!/)(?P<over>[0-9]+)/(?P<under>0*[1-9][0-9]*)(?![0-9/])              # 3/4, but not a date's 3/4/2020
          | (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?P<part>\.[0-9]+)?
            (?:(?<=[0-9])[eE](?P<power>[-+]?[0-9]{1,2})(?![0-9A-Za-z]))?
        )""",
    re.VERBOSE,
)
# A minus, with or without a currency behind it; behind a word, a number or a bracket it is a dash or a difference.
_NEGATIVE = re.compile(r"(?<![\w)\]])-[$€£¥]?\Z")
_MINUSES = str.maketrans("−–﹣－", "----")


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text, exactly: signs, `1,234.5`, `$5`, `.5`, `3/4`, `1e-4`; a percent sign does not count."""
    text = text.translate(_MINUSES)
    found = []
    for match in _NUMBER.finditer(text):
        if not match[0] or len(match[0]) > _LONGEST:
            continue
        if match["over"]:
            value = Fraction(int(match["over"]), int(match["under"]))
        else:
            value = Fraction((match["whole"] or "0").replace(",", "") + (match["part"] or ""))
            value *= Fraction(10) ** int(match["power"] or 0)
        negative = _NEGATIVE.search(text[max(0, match.start() - 3) : match.start()])
        found.append(-value if negative else value)
    return found


def final_number(text: str) -> Fraction | None:
    """The number behind the last `####` where there is that mark (GSM8K's), else the last number of the text."""
    _, mark, behind = text.rpartition(_MARK)
    found = numbers(behind)
    if not found:
        return None
    return found[0] if mark else found[-1]


@METRICS.register("number-match")
def number_match(answer: str, reference: str) -> dict[str, float]:
    """The final number is the same: behind `####`, or the last; `1,200`, `$1200.00` and `1200` are one number.

    `1/2` is 0.5, and `50%` is 50, not 0.5: a unit is not computed with. Values are compared exactly, so 0.33 is not
    1/3. A row whose reference has no number has no score.
    """
    wanted = final_number(reference)
    return {} if wanted is None else {"": float(final_number(answer) == wanted)}
