"""Metrics of answers that are JSON: whether they are, whether they fit a schema, which of their values are right."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, create_model

from lorakit.errors import UserError
from lorakit.recipe.fields import PathRole, Wording
from lorakit.recipe.problem import one_line
from lorakit.registry import METRICS, Section

_SCHEMA = "A JSON schema: a file, or the schema itself. A `$ref` points into the schema itself; nothing is fetched."
_Schema = Annotated[
    Annotated[str, Field(min_length=1), PathRole("answer.schema.json")] | dict[str, Any],
    Wording("a JSON file, or the schema itself as a mapping", "answer.schema.json"),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # `schema` is also a deprecated method of every pydantic model
    JsonSchema: Any = create_model(
        "JsonSchema",
        __base__=Section,
        __module__=__name__,
        __doc__="Settings of json-schema.",
        schema=(_Schema, Field(description=_SCHEMA)),
    )

_NOT_JSON = (ValueError, RecursionError)


def _parse(text: str) -> Any:
    """The JSON value of `text`; raises `_NOT_JSON`. NaN and Infinity are not JSON."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@METRICS.register("json-valid")
def json_valid(answer: str, reference: str) -> dict[str, float]:
    """The whole answer is one JSON value, with nothing before or after it."""
    try:
        _parse(answer)
    except _NOT_JSON:
        return {"": 0.0}
    return {"": 1.0}


def _read_schema(settings: Any) -> Any:
    return json.loads(Path(settings.schema).read_bytes()) if isinstance(settings.schema, str) else settings.schema


def _schema_mistakes(settings: Any) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if isinstance(settings.schema, str) and not Path(settings.schema).is_file():
        return  # reported where the path is checked
    try:
        schema = _read_schema(settings)
        if not isinstance(schema, (dict, bool)):
            yield ("schema",), "the file holds no JSON object", "Write a file that holds one schema."
            return
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema, format_checker=kind.FORMAT_CHECKER)  # which also reads the patterns in it
    except (OSError, *_NOT_JSON) as error:
        yield ("schema",), f"it cannot be read as JSON: {one_line(str(error), 120)}", "Write a JSON file with a schema."
    except SchemaError as error:
        at = "/".join(map(str, error.absolute_path))
        where = f" at {one_line(at)}" if at else ""
        reason = f"it is no JSON schema{where}: {one_line(error.message, 120)}"
        yield ("schema",), reason, "Correct it; a schema is for example {type: object, required: [name]}."


@METRICS.register("json-schema", settings=JsonSchema, mistakes=_schema_mistakes, batched=True)
def json_schema(answers: Sequence[str], references: Sequence[str], settings: Any) -> list[dict[str, float]]:
    """The whole answer is one JSON value that fits a JSON schema. The reference is not read.

    The schema's `$schema` names its draft, 2020-12 if it names none; `format` is not checked, as the drafts have it.
    """
    import jsonschema_specifications
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing.exceptions import Unresolvable

    schema = _read_schema(settings)
    kind: Any = validator_for(schema, default=Draft202012Validator)
    # With this registry: the library's default one fetches a `$ref` from the network.
    validator = kind(schema, registry=jsonschema_specifications.REGISTRY)

    def fits(answer: str) -> bool:
        try:
            return bool(validator.is_valid(_parse(answer)))
        except _NOT_JSON:
            return False

    try:
        return [{"": float(fits(answer))} for answer in answers]
    except Unresolvable as error:
        raise UserError(
            f"evaluate.metrics: json-schema: the schema refers to {error.ref!r}, which it does not contain, and "
            "nothing is fetched. Put the definition under $defs in the schema itself."
        ) from error


@METRICS.register("json-fields")
def json_fields(answer: str, reference: str) -> dict[str, float]:
    """Per key of the reference object: the answer is a JSON object with the same value there."""
    given, expected = _object(answer), _object(reference)
    return {key: float(key in given and given[key] == value) for key, value in expected.items()}


def _object(text: str) -> dict[str, Any]:
    """The JSON object of a text in its canonical form; empty if it is none."""
    try:
        value = _parse(text)
    except _NOT_JSON:
        return {}
    return canonical(value) if isinstance(value, dict) else {}


def canonical(value: Any) -> Any:
    """A value that is equal to another one as JSON has it: 1 and 1.0 are one number, True and 1 are not."""
    if isinstance(value, dict):
        return {key: canonical(one) for key, one in value.items()}
    if isinstance(value, list):
        return [canonical(one) for one in value]
    return ("bool", value) if isinstance(value, bool) else value
