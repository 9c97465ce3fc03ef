"""What an unquoted word means: the core rules of YAML 1.2 (section 10.3.2 of its specification)."""

import math
import re
from decimal import Decimal

NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
ENDLESS = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_LONGEST_NUMBER = 100
_LARGEST_INT = 2**63 - 1


def resolve(text: str) -> bool | int | float | str | None:
    """The value of an unquoted word.

    Raises:
        ValueError: the word is a number that no setting can hold; the message says why.
    """
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if ENDLESS.fullmatch(text):
        raise ValueError("is not a finite number")
    if INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # Python refuses to parse very long decimal numbers; they are too large in any case.
        number = int(text, base) if len(text) <= _LONGEST_NUMBER else _LARGEST_INT + 1
        if abs(number) > _LARGEST_INT:
            raise ValueError("is too large a whole number")
        return number
    if FLOAT.fullmatch(text):
        if math.isinf(float(text)):
            raise ValueError("is too large a number")
        return float(text)
    return text


def other_notations(text: str) -> list[str]:
    """What a number may mean that is written in another way than YAML's: `0,0001`, `1,000`, `1_000`, `10%`."""
    share = re.fullmatch(r"([0-9]+(?:[.,][0-9]+)?) ?%", text)
    if share:
        return [f"{Decimal(share[1].replace(',', '.')) / 100:f}"]
    if re.fullmatch(r"[1-9][0-9]{0,2}([,_][0-9]{3})+(\.[0-9]+)?", text):
        return [text.replace(",", "").replace("_", "")]
    if re.fullmatch(r"[0-9]+(_[0-9]+)+(\.[0-9]+)?", text):
        return [text.replace("_", "")]
    if re.fullmatch(r"[0-9]+,[0-9]+([eE][-+]?[0-9]+)?", text):
        return [text.replace(",", ".")]
    return []
