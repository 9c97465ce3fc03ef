"""Amounts as people read them: rounded, but something never to nothing, and a part never to the whole; and as JSON
holds them."""

import math
from typing import Any

_SCORES = {"points": "{:.1f}", "ratio": "{:.3f}", "nats": "{:.4f}", "perplexity": "{:.4g}"}


def percent(share: float, digits: int = 0) -> str:
    """A share of 1 as per cent with so many digits: `12%`, `<1%` for a little, `>99%` for nearly all."""
    smallest = 10**-digits
    if 0 < share < 1 and float(f"{100 * share:.{digits}f}") in (0, 100):
        return f"<{smallest:g}%" if share < 0.5 else f">{100 - smallest:g}%"
    return f"{share:.{digits}%}"


def format_score(value: float, unit: str) -> str:
    """A score as a table shows it: a share of 1 as per cent, points of 100 as they are, nats with four decimals."""
    if math.isnan(value):
        return "-"
    return percent(value, 1) if unit == "share" else _SCORES.get(unit, "{:.4g}").format(value)


def format_difference(value: float, unit: str) -> str:
    """The difference of two scores with its sign; of shares in percentage points."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:+.1f}" if unit == "share" else ("+" if value >= 0 else "") + format_score(value, unit)


def without_nan(facts: Any) -> Any:
    """Plain data for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(facts, dict):
        return {key: without_nan(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [without_nan(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 step`, `1,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def gibibytes(count: float) -> str:
    """Bytes as GiB, MiB or KiB."""
    if count >= 2**29:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{math.ceil(count / 2**10)} KiB"


def gibibyte_cell(count: float) -> str:
    """Bytes in a column of GiB."""
    return "<0.01" if 0 < count < 0.005 * 2**30 else f"{count / 2**30:.2f}"


def decimal_bytes(count: float) -> str:
    """Bytes of a file as GB, MB or kB."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """`0.4 s`, `45 s`, `12 min`, `3.4 h` or `2.1 days`."""
    if 0 < seconds < 10:
        return f"{digits_of(seconds)} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def price(amount: float) -> str:
    """A price: cents, and below one as many digits as it takes to show two."""
    return f"{amount:,.2f}" if amount >= 1 or not amount else digits_of(amount)


def digits_of(number: float) -> str:
    """A positive number below 10 with two digits that count: `0.45`, `0.00031`, `3.4`."""
    places = max(1 - math.floor(math.log10(number)), 1)
    return f"{number:.{places}f}"
