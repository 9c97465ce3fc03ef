"""Metrics of answers that are JSON: that they are, that they fit a schema, which of their values are right."""

import json
from collections.abc import Sequence
from typing import Any

from lorakit.errors import UserError
from lorakit.evaluate.metrics.settings import JsonSchema, schema_mistakes, schema_of
from lorakit.registry import METRICS


def _parse(text: str) -> Any:
    """The JSON value of `text`; raises ValueError. NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@METRICS.register("json-valid")
def json_valid(answer: str, reference: str) -> dict[str, float]:
    """The whole answer is one JSON value, with nothing before or behind it."""
    try:
        _parse(answer)
    except (ValueError, RecursionError):
        return {"": 0.0}
    return {"": 1.0}


@METRICS.register("json-schema", settings=JsonSchema, mistakes=schema_mistakes, batched=True)
def json_schema(answers: Sequence[str], references: Sequence[str], settings: Any) -> list[dict[str, float]]:
    """The whole answer is one JSON value that fits a JSON schema. The reference is not read.

    The schema's `$schema` says its draft, 2020-12 where it says none; `format` is not checked, as the drafts have it.
    """
    import jsonschema_specifications
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing.exceptions import Unresolvable

    schema = schema_of(settings)
    # A registry of its own: the library's default fetches a `$ref` from the network.
    kind: Any = validator_for(schema, default=Draft202012Validator)
    validator = kind(schema, registry=jsonschema_specifications.REGISTRY)
    try:
        return [{"": float(_fits(validator, answer))} for answer in answers]
    except Unresolvable as error:
        raise UserError(
            f"evaluate.metrics: json-schema: the schema refers to {error.ref!r}, which it does not hold, and nothing "
            "is fetched. Put the definition under $defs in the schema itself."
        ) from error


def _fits(validator: Any, answer: str) -> bool:
    try:
        return bool(validator.is_valid(_parse(answer)))
    except (ValueError, RecursionError):
        return False


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
    """JSON equality: 1 and 1.0 are one number, True and 1 are not, at any depth."""
    if isinstance(expected, dict):
        return (
            isinstance(given, dict)
            and given.keys() == expected.keys()
            and all(_same(given[key], value) for key, value in expected.items())
        )
    if isinstance(expected, list):
        return (
            isinstance(given, list)
            and len(given) == len(expected)
            and all(_same(one, other) for one, other in zip(given, expected, strict=True))
        )
    return isinstance(given, bool) == isinstance(expected, bool) and bool(given == expected)
