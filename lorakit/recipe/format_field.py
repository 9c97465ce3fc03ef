"""`format` in a recipe: the word of a format, or a mapping of that word to the format's settings.

The mapping's keys are read from the table, so that errors, documents and the JSON schema know every format's settings.
"""

from typing import Any

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer

from lorakit.recipe.fields import word_of
from lorakit.recipe.section import Section
from lorakit.tables import FORMATS


class _OneFormat(Section):
    # The keys are made from the table: there is no source text with docstrings under them.
    model_config = ConfigDict(use_attribute_docstrings=False, json_schema_extra={"minProperties": 1})

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The formats that are not chosen are left out."""
        return {name: value for name, value in handler(self).items() if value is not None}


def _settings_by_name() -> Any:
    keys: dict[str, Any] = {
        entry.name: (entry.facts["settings"] | None, Field(default=None, description=f"Settings of {entry.name}."))
        for entry in FORMATS
        if "settings" in entry.facts
    }
    return create_model(
        "FormatSettings", __base__=_OneFormat, __module__=__name__, __doc__="One format, with its settings.", **keys
    )


FormatSettings: Any = _settings_by_name()
_WORD = word_of(FORMATS, "auto")
Format: Any = _WORD | FormatSettings
