"""Metrics of generated answers: answer and reference -> a score from 0 to 1, or several named ones.

A metric function takes two texts, the generated answer and the reference, and returns `{name suffix: score}`; the
empty suffix is the metric itself. Scores are averaged over rows; a name that some rows lack is averaged over the rest.
"""

import json
from typing import Any

from lorakit.tables import METRICS


def _parse(text: str) -> Any:
    """The JSON value of `text`; raises ValueError. NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@METRICS.register("exact-match")
def exact_match(answer: str, reference: str) -> dict[str, float]:
    """The answer is the reference, surrounding white space aside."""
    return {"": float(answer.strip() == reference.strip())}


@METRICS.register("json-valid")
def json_valid(answer: str, reference: str) -> dict[str, float]:
    """The whole answer is one JSON value, with nothing before or behind it."""
    try:
        _parse(answer)
    except (ValueError, RecursionError):
        return {"": 0.0}
    return {"": 1.0}


@METRICS.register("json-fields")
def json_fields(answer: str, reference: str) -> dict[str, float]:
    """Per key of the reference object: the answer is a JSON object with the same value there."""
    try:
        expected = _parse(reference)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(expected, dict):
        return {}
    try:
        given = _parse(answer)
    except (ValueError, RecursionError):
        given = {}
    if not isinstance(given, dict):
        given = {}
    missing = object()
    return {key: float(_same(given.get(key, missing), value)) for key, value in expected.items()}


def _same(given: Any, expected: Any) -> bool:
    """JSON equality: 1 and 1.0 are one number, True and 1 are not."""
    return isinstance(given, bool) == isinstance(expected, bool) and given == expected
