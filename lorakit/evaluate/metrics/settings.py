"""The settings that some metrics have of their own. The recipe's schema stands on them: no heavy import here."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from lorakit.recipe.fields import PathRole, Wording
from lorakit.recipe.problem import one_line, quote
from lorakit.recipe.section import Section

Mistake = tuple[tuple[str | int, ...], str, str]


class Regex(Section):
    """Settings of regex."""

    pattern: Annotated[str, Field(min_length=1), Wording("a regular expression", "'Answer: (\\w+)'")]
    """A regular expression that is looked for in answer and reference. Compared is the first of its groups that takes \
part, or the whole match where it has no groups; of a reference that it does not match, the whole text."""
    take: Literal["first", "last"] = "first"
    """Which match counts where there are several."""


class Bleu(Section):
    """Settings of bleu."""

    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """sacrebleu's tokenizer: `13a` is its default, `zh` for Chinese, `char` for scripts without spaces, `none` for \
texts that are tokenized already."""


class Chrf(Section):
    """Settings of chrf."""

    word_order: Annotated[int, Field(ge=0, le=2)] = 0
    """The longest word n-gram that counts beside characters: 0 is chrF, 2 is chrF++."""


_Schema = Annotated[
    Annotated[str, Field(min_length=1), PathRole("answer.schema.json")] | dict[str, Any],
    Wording("a JSON file, or the schema itself as a mapping", "answer.schema.json"),
]
_SCHEMA = "A JSON schema: a file, or the schema itself. A `$ref` reaches what the schema holds, and no network."
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # `schema` is also a deprecated method of every pydantic model
    JsonSchema: Any = create_model(
        "JsonSchema",
        __base__=Section,
        __module__=__name__,
        __doc__="Settings of json-schema.",
        schema=(_Schema, Field(description=_SCHEMA)),
    )


class Semantic(Section):
    """Settings of semantic-similarity."""

    model: Annotated[str, Field(min_length=1), PathRole("models/all-MiniLM-L6-v2", or_folder=True)]
    """The folder of an embedding model: an encoder with its tokenizer, as transformers or sentence-transformers saved \
it."""


def regex_mistakes(settings: Regex) -> Iterator[Mistake]:
    """What keeps the pattern from being a regular expression."""
    try:
        re.compile(settings.pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = f"{quote(settings.pattern)} is not a regular expression: {error}"
        yield ("pattern",), reason, "Correct it, or put a backslash before a character that is meant as it is."


def schema_of(settings: Any) -> Any:
    """The schema that json-schema's settings name, read from its file where it is one.

    Raises:
        ValueError: the file cannot be read, or is no JSON.
    """
    if not isinstance(settings.schema, str):
        return settings.schema
    try:
        return json.loads(Path(settings.schema).read_bytes())
    except (OSError, RecursionError) as error:
        raise ValueError(getattr(error, "strerror", None) or "nested too deeply") from error


def schema_mistakes(settings: Any) -> Iterator[Mistake]:
    """What keeps the schema from being one."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if isinstance(settings.schema, str) and not Path(settings.schema).is_file():
        return  # said where the path is checked
    try:
        schema = schema_of(settings)
    except ValueError as error:
        yield ("schema",), f"it cannot be read as JSON: {one_line(str(error), 120)}", "Write a JSON file with a schema."
        return
    if not isinstance(schema, (dict, bool)):
        yield ("schema",), "the file holds no JSON object", "Write a file that holds one schema."
        return
    try:
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema, format_checker=kind.FORMAT_CHECKER)  # which also reads the patterns in it
    except SchemaError as error:
        at = "/".join(map(str, error.absolute_path))
        where = f" at {one_line(at)}" if at else ""
        reason = f"it is no JSON schema{where}: {one_line(error.message, 120)}"
        yield ("schema",), reason, "Correct it; a schema is for example {type: object, required: [name]}."
